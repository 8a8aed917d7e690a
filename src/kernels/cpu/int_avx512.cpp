#include "kernels/cpu/int_avx512_inl.h"

namespace quantal {
namespace {

/// vpmaddubsw adds pairs of products in 16 bits, saturating: 2 * 127 * 127 and 2 * 128 * 127 fit.
struct IntAvx512Words : IntAvx512 {
  static constexpr bool kSigned = true;
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    if constexpr (kWide) {  // |u| and the sign of u times x
      x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(u), _mm512_setzero_si512(), x);
      u = _mm512_abs_epi8(u);
    }
    const I pairs = _mm512_maddubs_epi16(u, x);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace

const IntKernels& int_kernels_avx512() {
  static constexpr IntKernels kKernels = int_kernels<VecAvx512, IntAvx512Words>();
  return kKernels;
}

}  // namespace quantal

#include "kernels/cpu/int_avx2_inl.h"

namespace quantal {
namespace {

/// vpmaddubsw adds pairs of products in 16 bits, saturating: 2 * 127 * 127 and 2 * 128 * 127 fit.
struct IntAvx2Words : IntAvx2 {
  static constexpr bool kSigned = true;
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    if constexpr (kWide) {  // |u| and the sign of u times x
      x = _mm256_sign_epi8(x, u);
      u = _mm256_abs_epi8(u);
    }
    const I pairs = _mm256_maddubs_epi16(u, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const IntKernels& int_kernels_avx2() {
  static constexpr IntKernels kKernels = int_kernels<VecAvx2, IntAvx2Words>();
  return kKernels;
}

}  // namespace quantal

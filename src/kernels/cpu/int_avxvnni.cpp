#include "kernels/cpu/int_avx2_inl.h"

namespace quantal {
namespace {

struct IntAvxVnni : IntAvx2 {
  static constexpr bool kSigned = false;
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    return _mm256_dpbusd_avx_epi32(sum, u, x);
  }
};

}  // namespace

const IntKernels& int_kernels_avxvnni() {
  static constexpr IntKernels kKernels = int_kernels<VecAvx2, IntAvxVnni>();
  return kKernels;
}

}  // namespace quantal

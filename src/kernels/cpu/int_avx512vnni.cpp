#include "kernels/cpu/int_avx512_inl.h"

namespace quantal {
namespace {

struct IntAvx512Vnni : IntAvx512 {
  static constexpr bool kSigned = false;
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    // GCC 12 copies the sum before _mm512_dpbusd_epi32 and runs out of registers: half the speed.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
    return sum;
  }
};

}  // namespace

const IntKernels& int_kernels_avx512vnni() {
  static constexpr IntKernels kKernels = int_kernels<VecAvx512, IntAvx512Vnni>();
  return kKernels;
}

}  // namespace quantal

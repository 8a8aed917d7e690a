#include "kernels/cpu/int_neon_inl.h"

namespace quantal {
namespace {

struct IntNeonWords : IntNeon {
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    const int16x8_t low = vmull_s8(vget_low_s8(bytes(u)), vget_low_s8(bytes(x)));
    const int16x8_t high = vmull_high_s8(bytes(u), bytes(x));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
};

}  // namespace

const IntKernels& int_kernels_neon() {
  static constexpr IntKernels kKernels = int_kernels<VecNeon, IntNeonWords>();
  return kKernels;
}

}  // namespace quantal

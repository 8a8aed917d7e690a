#include "kernels/cpu/int_neon_inl.h"

namespace quantal {
namespace {

struct IntNeonDot : IntNeon {
  template <bool kWide>
  static I dot(I sum, I u, I x) {
    return vdotq_s32(sum, bytes(u), bytes(x));
  }
};

}  // namespace

const IntKernels& int_kernels_neondot() {
  static constexpr IntKernels kKernels = int_kernels<VecNeon, IntNeonDot>();
  return kKernels;
}

}  // namespace quantal

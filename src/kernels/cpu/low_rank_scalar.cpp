#include "kernels/cpu/low_rank_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {
namespace {

struct LowScalar : VecScalar {
  static constexpr int kTall = 1, kWide = 1;
};

}  // namespace

const LowRankKernels& low_rank_kernels_scalar() {
  static constexpr LowRankKernels kKernels = low_rank_kernels<LowScalar>();
  return kKernels;
}

}  // namespace quantal

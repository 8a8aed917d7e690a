#include "kernels/cpu/low_rank_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {
namespace {

struct LowNeon : VecNeon {
  static constexpr int kTall = 2, kWide = 2;
};

}  // namespace

const LowRankKernels& low_rank_kernels_neon() {
  static constexpr LowRankKernels kKernels = low_rank_kernels<LowNeon>();
  return kKernels;
}

}  // namespace quantal

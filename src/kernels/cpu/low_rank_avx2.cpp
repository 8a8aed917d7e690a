#include "kernels/cpu/low_rank_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {
namespace {

struct LowAvx2 : VecAvx2 {
  static constexpr int kTall = 2, kWide = 2;
};

}  // namespace

const LowRankKernels& low_rank_kernels_avx2() {
  static constexpr LowRankKernels kKernels = low_rank_kernels<LowAvx2>();
  return kKernels;
}

}  // namespace quantal

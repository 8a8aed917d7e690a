#include "kernels/cpu/low_rank_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {

struct LowAvx512 : VecAvx512 {
  static constexpr int kTall = 6, kWide = 4;
};

}  // namespace

const LowRankKernels& low_rank_kernels_avx512() {
  static constexpr LowRankKernels kKernels = low_rank_kernels<LowAvx512>();
  return kKernels;
}

}  // namespace quantal

#include "kernels/cpu/attention_few_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {
namespace {

struct FewScalar : VecScalar {
  static constexpr int kTile = 4;
  static void sums(const F* a, float scale, float* out) {
    for (int i = 0; i < kTile; ++i) out[i] = scale * sum(a[i]);
  }
};

}  // namespace

const FewRowsAttention& few_rows_attention_scalar() {
  static constexpr FewRowsAttention kKernels = {few_rows_part<FewScalar>,
                                                few_rows_finish<FewScalar>};
  return kKernels;
}

}  // namespace quantal

#include "kernels/cpu/int8_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {
namespace {

struct DotScalar {
  template <int kRows, int kInputs>
  static void run(const Int8Tile& t, int row, int input, std::int32_t* sums) {
    for (int m = input; m < input + kInputs; ++m) {
      for (int r = row; r < row + kRows; ++r) {
        std::int32_t sum = 0;
        for (std::int64_t k = 0; k < t.cols; ++k) {
          sum +=
              static_cast<std::int32_t>(t.codes[r * t.code_stride + k]) * t.x[m * t.x_stride + k];
        }
        sums[m * kInt8Rows + r] = sum;
      }
    }
  }
};

}  // namespace

const Int8Kernels& int8_kernels_scalar() {
  static constexpr Int8Kernels kKernels = {round_and_mark<VecScalar>,
                                           quantize_activations<VecScalar>, dot_tile<DotScalar>};
  return kKernels;
}

}  // namespace quantal

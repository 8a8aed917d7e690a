// The functions behind the ops of a GPU, as ops "quantal_cuda_test::*" of tensors on the CPU, where
// the tests' machine runs the kernels.
#include "kernels/cuda/launch.h"
#include "torch/cuda_library.h"
#include "torch/ops_aten.h"
#include "torch/ops_cuda.h"

namespace quantal::stable_ops {

STABLE_TORCH_LIBRARY(quantal_cuda_test, m) {
  m.def("dequantize(Tensor c, Tensor s, Tensor h, int[] spec, ScalarType dtype) -> Tensor");
  m.def("linear(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec) -> Tensor");
  m.def(
      "linear.out(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, *, "
      "Tensor(a!) out) -> ()");
  m.def(
      "linear_int8(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, "
      "float threshold) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor c, Tensor s, Tensor h, int[] spec) -> Tensor");
  m.def("row_square_sums(Tensor c, Tensor s, Tensor h, int[] spec, ScalarType dtype) -> Tensor");
  m.def("sampled_error(Tensor w, Tensor c, Tensor s, Tensor h, int[] spec) -> float");
  m.def(
      "merge_survival(Tensor c, Tensor s, Tensor h, Tensor nc, Tensor ns, Tensor nh, int[] spec, "
      "Tensor target) -> Tensor");
  m.def("quantize(Tensor weight, int[] spec) -> (Tensor, Tensor, Tensor)");
  m.def("chosen_linear(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? b, int[] spec) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quantal_cuda_test, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("linear.out", TORCH_BOX(&linear_out_cuda));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_cuda));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_cuda));
  m.impl("row_square_sums", TORCH_BOX(&row_square_sums_cuda));
  m.impl("sampled_error", TORCH_BOX(&sampled_error_aten));
  m.impl("merge_survival", TORCH_BOX(&merge_survival_aten));
  m.impl("quantize", TORCH_BOX(&quantize_cuda));
  m.impl("chosen_linear", TORCH_BOX(&gpu::Linear::call));
}

}  // namespace quantal::stable_ops

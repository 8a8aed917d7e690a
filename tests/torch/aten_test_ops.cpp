// The functions behind the ops of devices without kernels, as ops "quantal_aten_test::*" that the
// CPU has too; parts of weights, and sizes that a product chooses itself, can be given.
#include "torch/ops_aten.h"

namespace quantal::stable_ops {
namespace {

Tensor decode(Tensor codes, Tensor stats, Tensor shared, Ints spec, Ints panel, std::int64_t block,
              ScalarType type) {
  const AtenPacked w("test", codes, stats, shared, spec, block);
  return w.decoded({panel[0], panel[1], panel[2], panel[3]}, type);
}

PanelSizes sizes_of(std::int64_t bytes, bool into_views) {
  return {.bytes = bytes, .min_rows = 1, .min_cols = kColumnUnit, .into_views = into_views};
}

Tensor product(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
               Ints spec, std::int64_t block, std::int64_t bytes, bool into_views) {
  const AtenPacked w("test", codes, stats, shared, spec, block);
  return aten_product(w, sizes_of(bytes, into_views), x, w.bias(bias));
}

Tensor gradient(Tensor g, Tensor codes, Tensor stats, Tensor shared, Ints spec, std::int64_t bytes,
                bool into_views) {
  const AtenPacked w("test", codes, stats, shared, spec);
  return aten_gradient(w, sizes_of(bytes, into_views), g);
}

Tensor int8_product(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                    Ints spec, double threshold, std::int64_t most) {
  const AtenPacked w("test", codes, stats, shared, spec);
  return aten_int8_product(w, x, w.bias(bias), static_cast<float>(threshold), most);
}

}  // namespace

STABLE_TORCH_LIBRARY(quantal_aten_test, m) {
  m.def("quantize(Tensor weight, int[] spec) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize(Tensor c, Tensor s, Tensor h, int[] spec, ScalarType dtype) -> Tensor");
  m.def("dequantize.out(Tensor c, Tensor s, Tensor h, int[] spec, *, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec) -> Tensor");
  m.def(
      "linear.out(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, *, "
      "Tensor(a!) out) -> ()");
  m.def(
      "linear_int8(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, "
      "float threshold) -> Tensor");
  m.def(
      "linear_int8_activations(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec) "
      "-> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor c, Tensor s, Tensor h, int[] spec) -> Tensor");
  m.def("row_square_sums(Tensor c, Tensor s, Tensor h, int[] spec, ScalarType dtype) -> Tensor");
  m.def(
      "decode(Tensor c, Tensor s, Tensor h, int[] spec, int[] panel, int block, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "product(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, int block, "
      "int bytes, bool into_views) -> Tensor");
  m.def(
      "gradient(Tensor g, Tensor c, Tensor s, Tensor h, int[] spec, int bytes, bool into_views) "
      "-> Tensor");
  m.def(
      "int8_product(Tensor x, Tensor c, Tensor s, Tensor h, Tensor? bias, int[] spec, "
      "float threshold, int most) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quantal_aten_test, CompositeExplicitAutograd, m) {
  m.impl("quantize", TORCH_BOX(&quantize_aten));
  m.impl("dequantize", TORCH_BOX(&dequantize_aten));
  m.impl("dequantize.out", TORCH_BOX(&dequantize_out_aten));
  m.impl("linear", TORCH_BOX(&linear_aten));
  m.impl("linear.out", TORCH_BOX(&linear_out_aten));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_aten));
  m.impl("linear_int8_activations", TORCH_BOX(&linear_int8_activations_aten));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_aten));
  m.impl("row_square_sums", TORCH_BOX(&row_square_sums_aten));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("product", TORCH_BOX(&product));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("int8_product", TORCH_BOX(&int8_product));
}

}  // namespace quantal::stable_ops

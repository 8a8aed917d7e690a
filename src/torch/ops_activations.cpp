// Products with int8 activations (quantal/kernels.h, matmul_int8_activations) on torch's stable ABI
// (see ops_stable.cpp).
//
//   linear_int8_activations(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias,
//                           int[] spec) -> Tensor
//   linear_int8_activations.out: into a tensor of the result's shape and dtype
//
// The gradient is that of linear (Python registers it, C++ has ops.cpp).

#include <optional>
#include <vector>

#include "torch/ops_link.h"
#include "torch/stable_executor.h"
#include "torch/stable_products.h"

namespace quantal {
void link_activation_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

constexpr const char* kInput = "quantal::linear_int8_activations: x";

void product_into(const Packed& w, const Rows& x, const std::optional<Tensor>& bias, Rows& y) {
  std::vector<float> wide;
  const float* b = bias_values(bias, w.view.spec.rows, wide);
  matmul_int8_activations(w.view, weight_dtype(kInput, x.scalar_type()), x.data(), x.count(), b,
                          y.mutable_data(), stable_executor());
}

Tensor linear_int8_activations_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                   std::optional<Tensor> bias, Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype(kInput, x.scalar_type());
  const Rows rows(kInput, x, w.view.spec.cols);
  Rows y = Rows::fresh(x, w.view.spec.rows);
  product_into(w, rows, bias, y);
  return y.tensor();
}

void linear_int8_activations_out_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                     std::optional<Tensor> bias, Ints spec_ints, Tensor out) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype(kInput, x.scalar_type());
  const Rows rows(kInput, x, w.view.spec.cols);
  write_into("quantal::linear_int8_activations: out", out, x, bias, w.view.spec.rows,
             [&](Rows& y) { product_into(w, rows, bias, y); });
}

Tensor linear_int8_activations_meta(Tensor x, Tensor, Tensor, Tensor, std::optional<Tensor>,
                                    Ints spec) {
  return meta_with_last(x, spec_from_ints(spec).rows);
}
void linear_int8_activations_out_meta(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints,
                                      Tensor) {}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quantal, m) {
  m.def(
      "linear_int8_activations(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, "
      "int[] spec) -> Tensor");
  m.def(
      "linear_int8_activations.out(Tensor x, Tensor codes, Tensor stats, Tensor shared, "
      "Tensor? bias, int[] spec, *, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("linear_int8_activations", TORCH_BOX(&linear_int8_activations_cpu));
  m.impl("linear_int8_activations.out", TORCH_BOX(&linear_int8_activations_out_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("linear_int8_activations", TORCH_BOX(&linear_int8_activations_meta));
  m.impl("linear_int8_activations.out", TORCH_BOX(&linear_int8_activations_out_meta));
}

}  // namespace quantal::stable_ops

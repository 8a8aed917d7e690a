// The ops for tensors of any device that has no kernels of quantal's, on torch's stable ABI (see
// ops_stable.cpp): the "ATen path".
//
// They are registered under CompositeExplicitAutograd, which every device has that no other
// registration names: the CPU, meta and CUDA keep their own. Values have the bits of the CPU's
// kernels; products multiply decoded panels by the device's own product. Weights are quantized and
// compared by the CPU's code: they travel there and the results come back.
#include "torch/ops_aten.h"

#include "kernels/activations.h"
#include "torch/ops_cpu.h"
#include "torch/ops_link.h"
#include "torch/stable_products.h"

namespace quantal {
void link_aten_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

/// Not every device's product takes a result with gaps.
constexpr PanelSizes kPanels{.bytes = kDevicePanels.bytes,
                             .min_rows = kDevicePanels.min_rows,
                             .min_cols = kDevicePanels.min_cols,
                             .into_views = false};

stable::Device cpu() { return stable::Device(torch::headeronly::DeviceType::CPU); }
Tensor on_cpu(const Tensor& t) { return stable::to(detached(t), cpu()); }

/// Copies a product into a given tensor.
void store(Tensor& out, const Tensor& y) {
  Tensor target = detached(out);
  stable::copy_(target, y);
}

Tensor as_type_of(const Tensor& x, const Tensor& y) { return aten::cast(y, x.scalar_type()); }

// ------------------------------------------------------------------ activations in int8

/// x [m, runs, columns] as scale * q (quantal/kernels.h, matmul_int8_activations). A run with an
/// infinity or NaN becomes NaN.
Tensor rounded_runs(const Tensor& x) {
  const auto number = [&](double v) { return aten::scalar(x, v, ScalarType::Float); };
  const Tensor most = aten::largest(aten::magnitude(x), 2);
  const Tensor some = aten::cast(aten::at_least(most, number(kTinyRun)), ScalarType::Float);
  const Tensor factor = aten::divide(number(kMaxIntLevel), aten::maximum(most, number(kTinyRun)));
  Tensor q = aten::multiply(aten::multiply(x, factor), some);
  q = call("aten::round", "", q);
  return aten::multiply(q, aten::divide(most, number(kMaxIntLevel)));
}

/// x [m, cols] in runs of columns, float32.
Tensor rounded_activations(const Tensor& x, std::int64_t run) {
  const std::int64_t m = x.size(0), cols = x.size(1), whole = cols / run * run;
  const Tensor wide = aten::cast(x, ScalarType::Float);
  const Tensor out = empty_like_of(x, {m, cols}, ScalarType::Float);
  const auto round = [&](std::int64_t begin, std::int64_t end, std::int64_t width) {
    if (begin == end) return;
    const Tensor part =
        aten::reshape(aten::narrow(wide, 1, begin, end - begin), {m, (end - begin) / width, width});
    Tensor target = aten::narrow(out, 1, begin, end - begin);
    stable::copy_(target, aten::reshape(rounded_runs(part), {m, end - begin}));
  };
  round(0, whole, run);
  round(whole, cols, cols - whole);
  return out;
}

/// Weights are exact and sums are the device's: within the bound of the CPU's product, without its
/// speed.
Tensor int8_activations_product(const char* where, const AtenPacked& w, const Tensor& x,
                                const std::optional<Tensor>& bias) {
  const std::string refusal = int8_activations_refusal(w.spec());
  if (!refusal.empty()) fail(Errc::kUnsupported, std::string(where) + ": " + refusal);
  const Tensor y = empty_like_of(x, sizes_with_last(x, w.spec().rows), x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor rounded =
      rounded_activations(as_matrix(x, w.spec().cols), int8_activation_run(w.spec()));
  Tensor target = as_matrix(y, w.spec().rows);
  stable::copy_(target, aten_product(w, kPanels, rounded, bias));
  return y;
}

}  // namespace

// ------------------------------------------------------------------ products

Tensor aten_product(const AtenPacked& w, const PanelSizes& sizes, const Tensor& x,
                    const std::optional<Tensor>& bias) {
  const PackedSpec& spec = w.spec();
  const Tensor y = empty_like_of(x, sizes_with_last(x, spec.rows), x.scalar_type());
  if (y.numel() == 0) return y;
  std::optional<Tensor> own;
  if (bias) own = as_type_of(x, *bias);
  Tensor result = as_matrix(y, spec.rows);
  linear_by_panels(
      spec, sizes, [&](const Panel& p) { return w.decoded(p, x.scalar_type()); },
      as_matrix(x, spec.cols), own, result);
  return y;
}

Tensor aten_gradient(const AtenPacked& w, const PanelSizes& sizes, const Tensor& g) {
  const PackedSpec& spec = w.spec();
  Tensor dx = empty_like_of(g, sizes_with_last(g, spec.cols), g.scalar_type());
  if (dx.numel() == 0) return dx;
  if (spec.rows == 0) return stable::zero_(dx);
  Tensor result = as_matrix(dx, spec.cols);
  grad_by_panels(
      spec, sizes, [&](const Panel& p) { return w.decoded(p, g.scalar_type()); },
      as_matrix(g, spec.rows), result);
  return dx;
}

// ------------------------------------------------------------------ ops

Tensor dequantize_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type) {
  weight_dtype("quantal::dequantize: dtype", type);
  const AtenPacked w("quantal::dequantize", codes, stats, shared, spec);
  return w.decoded({0, w.spec().rows, 0, w.spec().cols}, type);
}

void dequantize_out_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, Tensor out) {
  const AtenPacked w("quantal::dequantize", codes, stats, shared, spec);
  w.check_decoded(out);
  w.decode({0, w.spec().rows, 0, w.spec().cols}, detached(out));
}

Tensor linear_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                   Ints spec) {
  const AtenPacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  return aten_product(w, kPanels, w.rows("x", x, w.spec().cols), w.bias(bias));
}

void linear_out_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                     std::optional<Tensor> bias, Ints spec, Tensor out) {
  const AtenPacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  w.check_product("quantal::linear: out", out, x, w.spec().rows);
  store(out, aten_product(w, kPanels, rows, w.bias(bias)));
}

Tensor linear_int8_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                        std::optional<Tensor> bias, Ints spec, double threshold) {
  const AtenPacked w("quantal::linear_int8", codes, stats, shared, spec);
  weight_dtype("quantal::linear_int8: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  return aten_int8_product(w, rows, w.bias(bias), static_cast<float>(threshold));
}

Tensor linear_int8_activations_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                    std::optional<Tensor> bias, Ints spec) {
  constexpr const char* kWhere = "quantal::linear_int8_activations";
  const AtenPacked w(kWhere, codes, stats, shared, spec);
  weight_dtype("quantal::linear_int8_activations: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  return int8_activations_product(kWhere, w, rows, w.bias(bias));
}

void linear_int8_activations_out_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                      std::optional<Tensor> bias, Ints spec, Tensor out) {
  constexpr const char* kWhere = "quantal::linear_int8_activations";
  const AtenPacked w(kWhere, codes, stats, shared, spec);
  weight_dtype("quantal::linear_int8_activations: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  w.check_product("quantal::linear_int8_activations: out", out, x, w.spec().rows);
  store(out, int8_activations_product(kWhere, w, rows, w.bias(bias)));
}

Tensor linear_grad_input_aten(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec) {
  const AtenPacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  return aten_gradient(w, kPanels, w.rows("grad", grad, w.spec().rows));
}

void linear_grad_input_out_aten(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec,
                                Tensor out) {
  const AtenPacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Tensor rows = w.rows("grad", grad, w.spec().rows);
  w.check_product("quantal::linear_grad_input: out", out, grad, w.spec().cols);
  store(out, aten_gradient(w, kPanels, rows));
}

Tensor row_square_sums_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type) {
  const AtenPacked w("quantal::row_square_sums", codes, stats, shared, spec);
  check_sum_dtype(type);
  const Tensor out = empty_like_of(codes, {w.spec().rows}, type);
  w.for_rows([&](RowRange rows, const Tensor& values) {
    const Tensor wide = aten::cast(values, type);
    Tensor target = aten::narrow(out, 0, rows.begin, rows.size());
    stable::copy_(target, aten::sum(aten::multiply(wide, wide), 1, type));
  });
  return out;
}

// ------------------------------------------------------------------ by the CPU

std::tuple<Tensor, Tensor, Tensor> quantize_aten(Tensor weight, Ints spec) {
  const auto [codes, stats, shared] = quantize_cpu(on_cpu(weight), spec);
  const stable::Device device = weight.device();
  return {stable::to(codes, device), stable::to(stats, device), stable::to(shared, device)};
}

double sampled_error_aten(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec) {
  return sampled_error_cpu(on_cpu(weight), on_cpu(codes), on_cpu(stats), on_cpu(shared), spec);
}

Tensor merge_survival_aten(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                           Tensor new_stats, Tensor new_shared, Ints spec, Tensor target) {
  return merge_survival_cpu(on_cpu(codes), on_cpu(stats), on_cpu(shared), on_cpu(new_codes),
                            on_cpu(new_stats), on_cpu(new_shared), spec, on_cpu(target));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CompositeExplicitAutograd, m) {
  m.impl("quantize", TORCH_BOX(&Explained<&quantize_aten>::call));
  m.impl("dequantize", TORCH_BOX(&Explained<&dequantize_aten>::call));
  m.impl("dequantize.out", TORCH_BOX(&Explained<&dequantize_out_aten>::call));
  m.impl("linear", TORCH_BOX(&Explained<&linear_aten>::call));
  m.impl("linear.out", TORCH_BOX(&Explained<&linear_out_aten>::call));
  m.impl("linear_int8", TORCH_BOX(&Explained<&linear_int8_aten>::call));
  m.impl("linear_int8_activations", TORCH_BOX(&Explained<&linear_int8_activations_aten>::call));
  m.impl("linear_int8_activations.out",
         TORCH_BOX(&Explained<&linear_int8_activations_out_aten>::call));
  m.impl("linear_grad_input", TORCH_BOX(&Explained<&linear_grad_input_aten>::call));
  m.impl("linear_grad_input.out", TORCH_BOX(&Explained<&linear_grad_input_out_aten>::call));
  m.impl("row_square_sums", TORCH_BOX(&Explained<&row_square_sums_aten>::call));
  m.impl("sampled_error", TORCH_BOX(&Explained<&sampled_error_aten>::call));
  m.impl("merge_survival", TORCH_BOX(&Explained<&merge_survival_aten>::call));
}

}  // namespace quantal::stable_ops

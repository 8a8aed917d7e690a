// The torch ops of quantal: one set for C++ and Python, on torch's stable ABI.
//
//   quantize(Tensor weight, int[] spec) -> (Tensor codes, Tensor stats, Tensor shared)
//   dequantize(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype) -> Tensor
//   linear(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec) -> Tensor
//   linear_int8(..., Tensor? bias, int[] spec, float threshold) -> Tensor
//   linear_grad_input(Tensor grad, Tensor codes, Tensor stats, Tensor shared, int[] spec) -> Tensor
//   dequantize.out, linear.out, linear_grad_input.out: into a tensor of the result's shape and
//   dtype
//
// `spec` is spec_to_ints(PackedSpec); codes, stats and shared are the uint8 buffers of
// layout_of(spec). Only torch/csrc/stable headers are used, so one binary serves torch >= 2.11.
// There is no autograd here: Python registers it, C++ has ops.cpp. Ops about the weights alone are
// in ops_weights.cpp, products with int8 activations in ops_activations.cpp, attention in
// ops_attention.cpp.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "torch/ops_cpu.h"
#include "torch/ops_link.h"
#include "torch/panel_products.h"
#include "torch/stable_executor.h"
#include "torch/stable_products.h"

namespace quantal {
void link_torch_ops() noexcept {
  link_weight_ops();
  link_activation_ops();
  link_attention_ops();
  link_low_rank_ops();
  link_cuda_ops();
  link_cuda_weight_ops();
  link_aten_ops();
}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

bool use_packed_product(const PackedSpec& spec, DType dtype, std::int64_t m, ProductKind product) {
  return supports_packed_matmul(spec) && m <= packed_matmul_max_rows(spec, dtype, product);
}

// ------------------------------------------------------------------ products over panels

/// An uninitialised [rows, cols] tensor for a panel, in memory that the calling thread keeps (about
/// kPanelBytes): the same addresses stay in its cache from one product to the next.
Tensor panel_scratch(const Tensor& like, std::int64_t rows, std::int64_t cols) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::int64_t capacity = 0;
  const ScalarType type = like.scalar_type();
  const std::int64_t element = type == ScalarType::Float ? 4 : 2;
  const std::int64_t bytes = ceil_div(rows * cols * element, 64) * 64;
  if (bytes > capacity) {
    capacity = 0;
    memory.reset(std::aligned_alloc(64, static_cast<std::size_t>(bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = bytes;
  }
  const std::array<std::int64_t, 2> shape{rows, cols};
  const std::array<std::int64_t, 2> strides{cols, 1};
  return stable::from_blob(memory.get(), {shape.data(), 2}, {strides.data(), 2}, like.device(),
                           type);
}

/// Decoded panels for products of `like`'s type.
auto panels_of(const PackedView& w, DType dtype, const Tensor& like) {
  return [&w, dtype, &like](const Panel& p) {
    const std::int64_t cols = p.col_end - p.col_begin;
    Tensor panel = panel_scratch(like, p.row_end - p.row_begin, cols);
    dequantize(w, p, dtype, panel.mutable_data_ptr(), cols, stable_executor());
    return panel;
  };
}

constexpr PanelSizes kPanels{
    .bytes = kPanelBytes, .min_rows = kMinPanelRows, .min_cols = kMinPanelCols, .into_views = true};

// ------------------------------------------------------------------ CPU kernels

std::tuple<Tensor, Tensor, Tensor> packed_buffers(const Tensor& like, const PackedSpec& spec) {
  const PackedLayout layout = layout_of(spec);
  return {empty_like_of(like, {spec.rows, layout.code_bytes}, ScalarType::Byte),
          empty_like_of(like, {layout.stat_rows, layout.stat_bytes}, ScalarType::Byte),
          empty_like_of(like, {layout.shared_bytes}, ScalarType::Byte)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(Tensor weight, Ints spec_ints) {
  const PackedSpec spec = spec_from_ints(spec_ints);
  check_cpu("quantal::quantize: weight", weight);
  const DType dtype = checked_weight(weight, spec);
  const Tensor source = stable::contiguous(weight);
  auto [codes, stats, shared] = packed_buffers(weight, spec);
  stable::zero_(shared);
  const auto bytes = [](Tensor& t) { return static_cast<std::uint8_t*>(t.mutable_data_ptr()); };
  dialect_by_id(spec.dialect)
      .quantize(spec, dtype, source.const_data_ptr(), bytes(codes), bytes(stats), bytes(shared),
                stable_executor());
  return {codes, stats, shared};
}

namespace {

Tensor dequantize_cpu(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints, ScalarType type) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const DType dtype = weight_dtype("quantal::dequantize: dtype", type);
  const PackedSpec& spec = w.view.spec;
  Tensor out = result_like(codes, {spec.rows, spec.cols}, type);
  dequantize(w.view, {0, spec.rows, 0, spec.cols}, dtype, out.mutable_data_ptr(), spec.cols,
             stable_executor());
  return out;
}

/// The dtype is that of `out`.
void dequantize_out_cpu(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints, Tensor out) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  check_cpu("quantal::dequantize: out", out);
  check_dense_out("quantal::dequantize: out", out, spec);
  const DType dtype = weight_dtype("quantal::dequantize: out", out.scalar_type());
  dequantize(w.view, {0, spec.rows, 0, spec.cols}, dtype, out.mutable_data_ptr(), spec.cols,
             stable_executor());
}

/// A checked bias as the framework's products take it: contiguous, in `type`, without history.
std::optional<Tensor> bias_as(const std::optional<Tensor>& bias, std::int64_t rows,
                              ScalarType type) {
  if (!given(bias)) return std::nullopt;
  check_bias(*bias, rows);
  return stable::contiguous(stable::to(detached(*bias), type));
}

/// y [m, rows] = x @ w^T + bias.
void linear_into(const Packed& w, const Rows& x, const std::optional<Tensor>& bias, Rows& y) {
  const PackedSpec& spec = w.view.spec;
  const DType dtype = weight_dtype("quantal::linear: x", x.scalar_type());
  const std::int64_t m = x.count();
  if (use_packed_product(spec, dtype, m, ProductKind::kForward)) {
    std::vector<float> wide;
    const float* b = bias_values(bias, spec.rows, wide);
    if (m > 0) matmul(w.view, dtype, x.data(), m, b, y.mutable_data(), stable_executor());
    return;
  }
  auto b = bias_as(bias, spec.rows, x.scalar_type());
  Tensor operand = x.matrix(), result = y.matrix();
  if (m > 0) {
    linear_by_panels(spec, kPanels, panels_of(w.view, dtype, operand), operand, b, result);
  }
}

/// dx [m, cols] = g @ w.
void grad_input_into(const Packed& w, const Rows& g, Rows& dx) {
  const PackedSpec& spec = w.view.spec;
  const DType dtype = weight_dtype("quantal::linear_grad_input: grad", g.scalar_type());
  const std::int64_t m = g.count();
  if (spec.rows == 0) {
    Tensor zeros = dx.tensor();
    stable::zero_(zeros);
  }
  if (m == 0) return;
  if (use_packed_product(spec, dtype, m, ProductKind::kBackward)) {
    matmul_transposed(w.view, dtype, g.data(), m, dx.mutable_data(), stable_executor());
    return;
  }
  Tensor operand = g.matrix(), result = dx.matrix();
  grad_by_panels(spec, kPanels, panels_of(w.view, dtype, operand), operand, result);
}

Tensor linear_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                  Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Rows rows("quantal::linear: x", x, w.view.spec.cols);
  Rows y = Rows::fresh(x, w.view.spec.rows);
  linear_into(w, rows, bias, y);
  return y.tensor();
}

/// The product of LLM.int8 (quantal/kernels.h, matmul_int8).
Tensor linear_int8_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                       std::optional<Tensor> bias, Ints spec_ints, double threshold) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  const DType dtype = weight_dtype("quantal::linear_int8: x", x.scalar_type());
  const Rows rows("quantal::linear_int8: x", x, spec.cols);
  Rows y = Rows::fresh(x, spec.rows);
  std::vector<float> wide;
  const float* b = bias_values(bias, spec.rows, wide);
  matmul_int8(w.view, dtype, rows.data(), rows.count(), b, static_cast<float>(threshold),
              y.mutable_data(), stable_executor());
  return y.tensor();
}

Tensor linear_grad_input_cpu(Tensor grad, Tensor codes, Tensor stats, Tensor shared,
                             Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Rows rows("quantal::linear_grad_input: grad", grad, w.view.spec.rows);
  Rows dx = Rows::fresh(grad, w.view.spec.cols);
  grad_input_into(w, rows, dx);
  return dx.tensor();
}

// ------------------------------------------------------------------ products into a given tensor

void linear_out_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                    Ints spec_ints, Tensor out) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Rows rows("quantal::linear: x", x, w.view.spec.cols);
  write_into("quantal::linear: out", out, x, bias, w.view.spec.rows,
             [&](Rows& y) { linear_into(w, rows, bias, y); });
}

void linear_grad_input_out_cpu(Tensor grad, Tensor codes, Tensor stats, Tensor shared,
                               Ints spec_ints, Tensor out) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Rows rows("quantal::linear_grad_input: grad", grad, w.view.spec.rows);
  write_into("quantal::linear_grad_input: out", out, grad, std::nullopt, w.view.spec.cols,
             [&](Rows& dx) { grad_input_into(w, rows, dx); });
}

// ------------------------------------------------------------------ meta kernels

std::tuple<Tensor, Tensor, Tensor> quantize_meta(Tensor weight, Ints spec) {
  return packed_buffers(weight, spec_from_ints(spec));
}
Tensor dequantize_meta(Tensor codes, Tensor, Tensor, Ints spec_ints, ScalarType type) {
  const PackedSpec spec = spec_from_ints(spec_ints);
  return empty_like_of(codes, {spec.rows, spec.cols}, type);
}
Tensor linear_meta(Tensor x, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints spec) {
  return meta_with_last(x, spec_from_ints(spec).rows);
}
Tensor linear_int8_meta(Tensor x, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints spec,
                        double) {
  return meta_with_last(x, spec_from_ints(spec).rows);
}
Tensor linear_grad_input_meta(Tensor grad, Tensor, Tensor, Tensor, Ints spec) {
  return meta_with_last(grad, spec_from_ints(spec).cols);
}

void dequantize_out_meta(Tensor, Tensor, Tensor, Ints, Tensor) {}
void linear_out_meta(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints, Tensor) {}
void linear_grad_input_out_meta(Tensor, Tensor, Tensor, Tensor, Ints, Tensor) {}

}  // namespace

STABLE_TORCH_LIBRARY(quantal, m) {
  m.def("quantize(Tensor weight, int[] spec) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "dequantize.out(Tensor codes, Tensor stats, Tensor shared, int[] spec, *, Tensor(a!) out) "
      "-> ()");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec) "
      "-> Tensor");
  m.def(
      "linear.out(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec, "
      "*, Tensor(a!) out) -> ()");
  m.def(
      "linear_int8(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec, "
      "float threshold) -> Tensor");
  m.def(
      "linear_grad_input(Tensor grad, Tensor codes, Tensor stats, Tensor shared, int[] spec) "
      "-> Tensor");
  m.def(
      "linear_grad_input.out(Tensor grad, Tensor codes, Tensor stats, Tensor shared, int[] spec, "
      "*, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("dequantize.out", TORCH_BOX(&dequantize_out_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear.out", TORCH_BOX(&linear_out_cpu));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_cpu));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_cpu));
  m.impl("linear_grad_input.out", TORCH_BOX(&linear_grad_input_out_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("quantize", TORCH_BOX(&quantize_meta));
  m.impl("dequantize", TORCH_BOX(&dequantize_meta));
  m.impl("dequantize.out", TORCH_BOX(&dequantize_out_meta));
  m.impl("linear", TORCH_BOX(&linear_meta));
  m.impl("linear.out", TORCH_BOX(&linear_out_meta));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_meta));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_meta));
  m.impl("linear_grad_input.out", TORCH_BOX(&linear_grad_input_out_meta));
}

}  // namespace quantal::stable_ops

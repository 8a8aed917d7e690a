// The torch ops for tensors on a GPU, on torch's stable ABI (see ops_stable.cpp).
//
// Kernels come from a library of their own (cuda_library.h); where it is not in use every op throws
// Error{kDevice} with the reason. They are enqueued on torch's current stream of the weight's
// device and nothing here waits for them, so the ops can be captured into graphs.
#include "torch/ops_cuda.h"

#include <algorithm>
#include <array>

#include "torch/cuda_tensor.h"
#include "torch/ops_link.h"
#include "torch/stable_products.h"

namespace quantal {
void link_cuda_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

/// Rows of activations up to which tiles of decoded weights are used; above, panels of a decoded
/// matrix and the framework's product. A product over tiles moves 0.6 bytes a weight and runs at
/// the rate of mma.sync, panels move 4.6 and run at the framework's: by arithmetic they meet at
/// some hundred rows. Not measured.
constexpr std::int64_t kMaxTileInputs = 256;
constexpr std::int64_t kMaxSmallInputs = 16;
constexpr std::int64_t kPanelBytes = 64 << 20;  // of a decoded panel

int number_of(ScalarType type, const char* what) {
  return static_cast<int>(weight_dtype(what, type));
}
std::int64_t element_bytes(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

Tensor as_matrix(const Tensor& t, std::int64_t width) {
  const std::array<std::int64_t, 2> shape{width == 0 ? 0 : t.numel() / width, width};
  return stable::view(detached(t), {shape.data(), shape.size()});
}

void dequantize_panel(const DevicePacked& w, const Panel& p, Tensor& out) {
  const std::int64_t rows = p.row_end - p.row_begin, cols = p.col_end - p.col_begin;
  const quantal_cuda_panel panel{w.view(),
                                 p.row_begin,
                                 rows,
                                 p.col_begin,
                                 cols,
                                 number_of(out.scalar_type(), "quantal::dequantize: dtype"),
                                 out.mutable_data_ptr(),
                                 cols};
  quantal_cuda_status status{};
  check_cuda(w.kernels().dequantize(&panel, w.stream(), &status), status);
}

// ------------------------------------------------------------------ products

/// y = x w^T (+ bias), a panel of rows of w at a time.
void linear_by_panels(const DevicePacked& w, const Tensor& x, std::optional<Tensor> bias,
                      Tensor& y) {
  const PackedSpec& spec = w.spec();
  const std::int64_t step = std::clamp<std::int64_t>(
      kPanelBytes / (spec.cols * element_bytes(x.scalar_type())), 1, spec.rows);
  Tensor operand = as_matrix(x, spec.cols), result = as_matrix(y, spec.rows);
  if (bias) bias = stable::to(*bias, x.scalar_type());
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t count = std::min(step, spec.rows - begin);
    Tensor panel = empty_like_of(x, {count, spec.cols}, x.scalar_type());
    dequantize_panel(w, {begin, begin + count, 0, spec.cols}, panel);
    Tensor out = stable::narrow(result, 1, begin, count);
    std::optional<Tensor> part;
    if (bias) part = stable::narrow(*bias, 0, begin, count);
    call("aten::linear", "out", operand, panel, part, out);
  }
}

/// dx = g w, a panel of columns at a time.
void grad_by_panels(const DevicePacked& w, const Tensor& g, Tensor& dx) {
  const PackedSpec& spec = w.spec();
  const std::int64_t fitting = kPanelBytes / (spec.rows * element_bytes(g.scalar_type()));
  const std::int64_t step =
      std::min(spec.cols, std::max(kColumnUnit, fitting / kColumnUnit * kColumnUnit));
  Tensor operand = as_matrix(g, spec.rows), result = as_matrix(dx, spec.cols);
  for (std::int64_t begin = 0; begin < spec.cols; begin += step) {
    const std::int64_t count = std::min(step, spec.cols - begin);
    Tensor panel = empty_like_of(g, {spec.rows, count}, g.scalar_type());
    dequantize_panel(w, {0, spec.rows, begin, begin + count}, panel);
    Tensor out = stable::narrow(result, 1, begin, count);
    call("aten::mm", "out", operand, panel, out);
  }
}

using Launch = int (*)(const quantal_cuda_product*, quantal_cuda_stream, quantal_cuda_status*);

/// Launches a product if the kernel takes it; false if not.
bool launched(const DevicePacked& w, const quantal_cuda_product& product, Launch launch) {
  quantal_cuda_status status{};
  const int code = launch(&product, w.stream(), &status);
  if (code == QUANTAL_CUDA_UNSUPPORTED) return false;
  check_cuda(code, status);
  return true;
}

quantal_cuda_product product_of(const DevicePacked& w, const Tensor& x, std::int64_t width,
                                const std::optional<Tensor>& bias, Tensor& y) {
  return {w.view(),
          number_of(x.scalar_type(), "quantal: x"),
          x.const_data_ptr(),
          x.numel() / width,
          bias ? bias->const_data_ptr() : nullptr,
          bias ? number_of(bias->scalar_type(), "quantal: bias") : 0,
          y.mutable_data_ptr()};
}

/// Both are contiguous and aligned.
void linear_into(const DevicePacked& w, const Tensor& x, const std::optional<Tensor>& bias,
                 Tensor& y) {
  const quantal_cuda_interface& k = w.kernels();
  const quantal_cuda_product p = product_of(w, x, w.spec().cols, bias, y);
  if (p.inputs == 0 || w.spec().rows == 0) return;
  if (p.inputs <= kMaxSmallInputs && launched(w, p, k.small_matmul)) {
    return;
  }
  if (p.inputs <= kMaxTileInputs && launched(w, p, k.tile_matmul)) return;
  linear_by_panels(w, x, bias, y);
}

void grad_into(const DevicePacked& w, const Tensor& g, Tensor& dx) {
  const quantal_cuda_interface& k = w.kernels();
  if (w.spec().rows == 0) {
    stable::zero_(dx);
    return;
  }
  const quantal_cuda_product p = product_of(w, g, w.spec().rows, std::nullopt, dx);
  if (p.inputs == 0) return;
  if (p.inputs <= kMaxTileInputs && launched(w, p, k.tile_matmul_transposed)) {
    return;
  }
  grad_by_panels(w, g, dx);
}

/// Checks `out` and calls `product` with it, or with a fresh tensor that is copied where out has
/// gaps, is not aligned or shares memory with an operand.
template <class Product>
void into(const DevicePacked& w, const char* what, Tensor& out, const Tensor& x, bool apart,
          std::int64_t width, Product product) {
  w.check_place(what, out);
  const Ints sizes = sizes_with_last(x, width);
  const auto actual = out.sizes();
  if (out.scalar_type() != x.scalar_type()) {
    fail(Errc::kDtype, std::string(what) + " is " + type_name(out.scalar_type()) + ", expected " +
                           type_name(x.scalar_type()) + " as the input");
  }
  if (!std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end())) {
    fail(Errc::kShape, std::string(what) + " has shape " + sizes_string(out) + ", expected " +
                           shape_string(sizes));
  }
  if (apart && out.is_contiguous() &&
      reinterpret_cast<std::uintptr_t>(out.const_data_ptr()) % 16 == 0) {
    return product(out);
  }
  Tensor fresh = empty_like_of(x, sizes, x.scalar_type());
  product(fresh);
  Tensor target = detached(out);
  stable::copy_(target, fresh);
}

}  // namespace

// ------------------------------------------------------------------ ops

Tensor dequantize_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type) {
  const DevicePacked w("quantal::dequantize", codes, stats, shared, spec);
  weight_dtype("quantal::dequantize: dtype", type);
  Tensor out = empty_like_of(codes, {w.spec().rows, w.spec().cols}, type);
  dequantize_panel(w, {0, w.spec().rows, 0, w.spec().cols}, out);
  return out;
}

void dequantize_out_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints, Tensor out) {
  const DevicePacked w("quantal::dequantize", codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.spec();
  w.check_place("quantal::dequantize: out", out);
  weight_dtype("quantal::dequantize: out", out.scalar_type());
  if (out.dim() != 2 || out.size(0) != spec.rows || out.size(1) != spec.cols ||
      !out.is_contiguous()) {
    fail(Errc::kShape, "quantal::dequantize: out has shape " + sizes_string(out) +
                           ", expected a contiguous [" + std::to_string(spec.rows) + ", " +
                           std::to_string(spec.cols) + "]");
  }
  dequantize_panel(w, {0, spec.rows, 0, spec.cols}, out);
}

Tensor linear_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                   Ints spec) {
  const DevicePacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  Tensor y = empty_like_of(x, sizes_with_last(x, w.spec().rows), x.scalar_type());
  linear_into(w, rows, w.bias(bias), y);
  return y;
}

void linear_out_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                     std::optional<Tensor> bias, Ints spec, Tensor out) {
  const DevicePacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  const std::optional<Tensor> b = w.bias(bias);
  const bool apart = !share_memory(out, x) && !(b && share_memory(out, *b));
  into(w, "quantal::linear: out", out, x, apart, w.spec().rows,
       [&](Tensor& y) { linear_into(w, rows, b, y); });
}

Tensor linear_int8_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                        std::optional<Tensor> bias, Ints spec, double threshold) {
  const DevicePacked w("quantal::linear_int8", codes, stats, shared, spec);
  weight_dtype("quantal::linear_int8: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  const std::optional<Tensor> b = w.bias(bias);
  Tensor y = empty_like_of(x, sizes_with_last(x, w.spec().rows), x.scalar_type());
  quantal_cuda_int8_product p{product_of(w, rows, w.spec().cols, b, y),
                              static_cast<float>(threshold), nullptr, 0};
  p.workspace_bytes = w.kernels().int8_workspace(p.product.inputs, w.spec().cols);
  if (p.workspace_bytes < 0) {
    fail(Errc::kShape, "quantal::linear_int8: x has " + std::to_string(p.product.inputs) +
                           " rows, expected fewer");
  }
  Tensor workspace = empty_like_of(codes, {p.workspace_bytes}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  quantal_cuda_status status{};
  check_cuda(w.kernels().int8_matmul(&p, w.stream(), &status), status);
  return y;
}

Tensor linear_grad_input_cuda(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec) {
  const DevicePacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Tensor rows = w.rows("grad", grad, w.spec().rows);
  Tensor dx = empty_like_of(grad, sizes_with_last(grad, w.spec().cols), grad.scalar_type());
  grad_into(w, rows, dx);
  return dx;
}

void linear_grad_input_out_cuda(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec,
                                Tensor out) {
  const DevicePacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Tensor rows = w.rows("grad", grad, w.spec().rows);
  into(w, "quantal::linear_grad_input: out", out, grad, !share_memory(out, grad), w.spec().cols,
       [&](Tensor& dx) { grad_into(w, rows, dx); });
}

Tensor row_square_sums_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec) {
  const DevicePacked w("quantal::row_square_sums", codes, stats, shared, spec);
  Tensor out = empty_like_of(codes, {w.spec().rows}, ScalarType::Double);
  const quantal_cuda_norms p{w.view(), static_cast<double*>(out.mutable_data_ptr())};
  quantal_cuda_status status{};
  check_cuda(w.kernels().row_square_sums(&p, w.stream(), &status), status);
  return out;
}

namespace {

/// "on: <file>", or why the CUDA kernels are not in use.
std::string cuda_status() {
  const CudaLibrary& library = cuda_library();
  return library.functions != nullptr ? "on: " + library.text : library.text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quantal, m) { m.def("cuda_status() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(quantal, CompositeExplicitAutograd, m) {
  m.impl("cuda_status", TORCH_BOX(&cuda_status));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
  m.impl("dequantize.out", TORCH_BOX(&dequantize_out_cuda));
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("linear.out", TORCH_BOX(&linear_out_cuda));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_cuda));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_cuda));
  m.impl("linear_grad_input.out", TORCH_BOX(&linear_grad_input_out_cuda));
  m.impl("row_square_sums", TORCH_BOX(&row_square_sums_cuda));
}

}  // namespace quantal::stable_ops

// The torch ops for tensors on a GPU, on torch's stable ABI (see ops_stable.cpp).
//
// Kernels come from a library of their own (cuda_library.h); where it is not in use the ops are
// those of ops_aten.cpp. Kernels are enqueued on torch's current stream of the weight's device and
// nothing here waits for them, so the ops can be captured into graphs.
#include "torch/ops_cuda.h"

#include <utility>

#include "torch/cuda_tensor.h"
#include "torch/ops_aten.h"
#include "torch/ops_cpu.h"
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
constexpr std::int64_t kMaxSmallInputs = 32;

int number_of(ScalarType type, const char* what) {
  return static_cast<int>(weight_dtype(what, type));
}

void dequantize_panel(const CudaPacked& w, const Panel& p, Tensor& out) {
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

/// Decoded panels for products of `like`'s type.
auto panels_of(const CudaPacked& w, const Tensor& like) {
  return [&w, &like](const Panel& p) {
    const Ints sizes{p.row_end - p.row_begin, p.col_end - p.col_begin};
    Tensor panel = empty_like_of(like, sizes, like.scalar_type());
    dequantize_panel(w, p, panel);
    return panel;
  };
}

using Launch = int (*)(const quantal_cuda_product*, quantal_cuda_stream, quantal_cuda_status*);

/// Launches a product if the kernel takes it; false if not.
bool launched(const CudaPacked& w, const quantal_cuda_product& product, Launch launch) {
  quantal_cuda_status status{};
  const int code = launch(&product, w.stream(), &status);
  if (code == QUANTAL_CUDA_UNSUPPORTED) return false;
  check_cuda(code, status);
  return true;
}

quantal_cuda_product product_of(const CudaPacked& w, const Tensor& x, std::int64_t width,
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
void linear_into(const CudaPacked& w, const Tensor& x, const std::optional<Tensor>& bias,
                 Tensor& y) {
  const quantal_cuda_interface& k = w.kernels();
  const quantal_cuda_product p = product_of(w, x, w.spec().cols, bias, y);
  if (p.inputs == 0 || w.spec().rows == 0) return;
  if (p.inputs <= kMaxSmallInputs && launched(w, p, k.small_matmul)) {
    return;
  }
  if (p.inputs <= kMaxTileInputs && launched(w, p, k.tile_matmul)) return;
  std::optional<Tensor> own = bias;
  if (own) own = stable::to(*own, x.scalar_type());
  Tensor result = as_matrix(y, w.spec().rows);
  linear_by_panels(w.spec(), kDevicePanels, panels_of(w, x), as_matrix(x, w.spec().cols), own,
                   result);
}

void grad_into(const CudaPacked& w, const Tensor& g, Tensor& dx) {
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
  Tensor result = as_matrix(dx, w.spec().cols);
  grad_by_panels(w.spec(), kDevicePanels, panels_of(w, g), as_matrix(g, w.spec().rows), result);
}

/// Checks `out` and calls `product` with it, or with a fresh tensor that is copied where out has
/// gaps, is not aligned or shares memory with an operand.
template <class Product>
void into(const CudaPacked& w, const char* what, Tensor& out, const Tensor& x, bool apart,
          std::int64_t width, Product product) {
  w.check_product(what, out, x, width);
  if (apart && out.is_contiguous() &&
      reinterpret_cast<std::uintptr_t>(out.const_data_ptr()) % 16 == 0) {
    return product(out);
  }
  Tensor fresh = empty_like_of(x, sizes_with_last(x, width), x.scalar_type());
  product(fresh);
  Tensor target = detached(out);
  stable::copy_(target, fresh);
}

}  // namespace

// ------------------------------------------------------------------ ops

Tensor dequantize_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type) {
  const CudaPacked w("quantal::dequantize", codes, stats, shared, spec);
  weight_dtype("quantal::dequantize: dtype", type);
  Tensor out = empty_like_of(codes, {w.spec().rows, w.spec().cols}, type);
  dequantize_panel(w, {0, w.spec().rows, 0, w.spec().cols}, out);
  return out;
}

void dequantize_out_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints, Tensor out) {
  const CudaPacked w("quantal::dequantize", codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.spec();
  w.check_decoded(out);
  dequantize_panel(w, {0, spec.rows, 0, spec.cols}, out);
}

Tensor linear_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                   Ints spec) {
  const CudaPacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  Tensor y = empty_like_of(x, sizes_with_last(x, w.spec().rows), x.scalar_type());
  linear_into(w, rows, w.bias(bias), y);
  return y;
}

void linear_out_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                     std::optional<Tensor> bias, Ints spec, Tensor out) {
  const CudaPacked w("quantal::linear", codes, stats, shared, spec);
  weight_dtype("quantal::linear: x", x.scalar_type());
  const Tensor rows = w.rows("x", x, w.spec().cols);
  const std::optional<Tensor> b = w.bias(bias);
  const bool apart = !share_memory(out, x) && !(b && share_memory(out, *b));
  into(w, "quantal::linear: out", out, x, apart, w.spec().rows,
       [&](Tensor& y) { linear_into(w, rows, b, y); });
}

Tensor linear_int8_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                        std::optional<Tensor> bias, Ints spec, double threshold) {
  const CudaPacked w("quantal::linear_int8", codes, stats, shared, spec);
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
  const CudaPacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Tensor rows = w.rows("grad", grad, w.spec().rows);
  Tensor dx = empty_like_of(grad, sizes_with_last(grad, w.spec().cols), grad.scalar_type());
  grad_into(w, rows, dx);
  return dx;
}

void linear_grad_input_out_cuda(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec,
                                Tensor out) {
  const CudaPacked w("quantal::linear_grad_input", codes, stats, shared, spec);
  weight_dtype("quantal::linear_grad_input: grad", grad.scalar_type());
  const Tensor rows = w.rows("grad", grad, w.spec().rows);
  into(w, "quantal::linear_grad_input: out", out, grad, !share_memory(out, grad), w.spec().cols,
       [&](Tensor& dx) { grad_into(w, rows, dx); });
}

Tensor row_square_sums_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type) {
  const CudaPacked w("quantal::row_square_sums", codes, stats, shared, spec);
  check_sum_dtype(type);
  Tensor out = empty_like_of(codes, {w.spec().rows}, ScalarType::Double);
  const quantal_cuda_norms p{w.view(), static_cast<double*>(out.mutable_data_ptr())};
  quantal_cuda_status status{};
  check_cuda(w.kernels().row_square_sums(&p, w.stream(), &status), status);
  return stable::to(out, type);
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
  m.impl("dequantize", TORCH_BOX(&gpu::Dequantize::call));
  m.impl("dequantize.out", TORCH_BOX(&gpu::DequantizeOut::call));
  m.impl("linear", TORCH_BOX(&gpu::Linear::call));
  m.impl("linear.out", TORCH_BOX(&gpu::LinearOut::call));
  m.impl("linear_int8", TORCH_BOX(&gpu::LinearInt8::call));
  m.impl("linear_grad_input", TORCH_BOX(&gpu::GradInput::call));
  m.impl("linear_grad_input.out", TORCH_BOX(&gpu::GradInputOut::call));
  m.impl("row_square_sums", TORCH_BOX(&gpu::RowSquareSums::call));
}

}  // namespace quantal::stable_ops

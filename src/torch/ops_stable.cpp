// The torch ops of quantal: one set for C++ and Python, on torch's stable ABI.
//
//   quantize(Tensor weight, int[] spec) -> (Tensor codes, Tensor stats, Tensor shared)
//   dequantize(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype) -> Tensor
//   linear(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec) -> Tensor
//   linear_grad_input(Tensor grad, Tensor codes, Tensor stats, Tensor shared, int[] spec) -> Tensor
//
// `spec` is spec_to_ints(PackedSpec); codes, stats and shared are the uint8 buffers of
// layout_of(spec). Only torch/csrc/stable headers are used, so one binary serves torch >= 2.11.
// There is no autograd here: Python registers it, C++ has autograd.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quantal/formats.h"
#include "quantal/kernels.h"
#include "torch/ops_link.h"
#include "torch/stable_executor.h"

namespace quantal {
void link_torch_ops() noexcept {}
}  // namespace quantal

namespace {

namespace stable = torch::stable;
using quantal::DType;
using quantal::Errc;
using quantal::PackedLayout;
using quantal::PackedSpec;
using quantal::PackedView;
using stable::Tensor;
using torch::headeronly::ScalarType;
using Ints = std::vector<std::int64_t>;

/// Bytes of decoded weights that a product holds at a time. Half of a usual last-level cache slice:
/// larger panels gain nothing, smaller ones lose to the fixed cost of a product.
constexpr std::int64_t kPanelBytes = 8 << 20;
/// Below these, products of panels were measured 1.2 to 1.5 times slower.
constexpr std::int64_t kMinPanelRows = 256;
constexpr std::int64_t kMinPanelCols = 128;
/// Panels begin at multiples of this column (contract of quantal::dequantize).
constexpr std::int64_t kColumnUnit = 128;

// ------------------------------------------------------------------ small helpers

/// Calls an ATen operator through the dispatcher and returns its one result.
template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

/// Forgets the autograd history: kernels compute values only, and out= products refuse tensors
/// that require gradients.
Tensor detached(const Tensor& t) { return call("aten::detach", "", t); }

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "of another type";
  }
}

DType weight_dtype(const char* what, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    default:
      quantal::fail(Errc::kDtype, std::string(what) + " is " + type_name(type) +
                                      ", expected float32, float16 or bfloat16");
  }
}

std::string sizes_string(const Tensor& t) {
  const auto sizes = t.sizes();
  return quantal::shape_string({sizes.data(), sizes.size()});
}

void check_cpu(const char* what, const Tensor& t) {
  if (!t.is_cpu()) {
    quantal::fail(Errc::kDevice, std::string(what) + " is not a CPU tensor, expected cpu");
  }
}

Tensor empty_like_of(const Tensor& like, const Ints& sizes, ScalarType type) {
  return stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

/// A packed weight whose buffers are held (made contiguous if needed) while a kernel reads them.
struct Packed {
  Tensor codes, stats, shared;
  PackedView view;
};

std::span<const std::uint8_t> bytes_of(const char* what, Tensor& t) {
  check_cpu(what, t);
  if (t.scalar_type() != ScalarType::Byte) {
    quantal::fail(Errc::kDtype,
                  std::string(what) + " is " + type_name(t.scalar_type()) + ", expected uint8");
  }
  if (!t.is_contiguous()) t = stable::contiguous(t);
  return {static_cast<const std::uint8_t*>(t.const_data_ptr()),
          static_cast<std::size_t>(t.numel())};
}

Packed packed_of(const Tensor& codes, const Tensor& stats, const Tensor& shared, const Ints& spec) {
  Packed p{codes, stats, shared, {}};
  p.view.spec = quantal::spec_from_ints(spec);
  p.view.codes = bytes_of("quantal: codes", p.codes);
  p.view.stats = bytes_of("quantal: stats", p.stats);
  p.view.shared = bytes_of("quantal: shared", p.shared);
  quantal::check_packed(p.view);
  return p;
}

/// Checks the last dimension and returns `t` as a contiguous matrix [m, width] without history.
Tensor as_matrix(const char* what, const Tensor& t, std::int64_t width) {
  check_cpu(what, t);
  if (t.dim() < 1 || t.size(t.dim() - 1) != width) {
    quantal::fail(Errc::kShape, std::string(what) + " has shape " + sizes_string(t) +
                                    ", expected last dimension " + std::to_string(width));
  }
  const std::int64_t m = width == 0 ? 0 : t.numel() / width;
  const std::array<std::int64_t, 2> shape{m, width};
  return stable::reshape(stable::contiguous(detached(t)), {shape.data(), shape.size()});
}

/// Sizes of `t` with the last one replaced.
Ints sizes_with_last(const Tensor& t, std::int64_t last) {
  const auto sizes = t.sizes();
  Ints out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

bool use_packed_product(const PackedSpec& spec, DType dtype, std::int64_t m) {
  return quantal::supports_packed_matmul(spec) && m <= quantal::packed_matmul_max_rows(spec, dtype);
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
  const std::int64_t bytes = quantal::ceil_div(rows * cols * element, 64) * 64;
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

/// y[:, r0:r1] = x @ w[r0:r1, :]^T (+ bias[r0:r1]), a panel of rows at a time.
void linear_by_panels(const PackedView& w, DType dtype, Tensor& x, std::optional<Tensor>& bias,
                      Tensor& y) {
  const auto& spec = w.spec;
  const auto element = static_cast<std::int64_t>(quantal::dtype_size(dtype));
  const std::int64_t step =
      std::min(spec.rows, std::max(kMinPanelRows, kPanelBytes / (spec.cols * element)));
  Tensor scratch = panel_scratch(x, step, spec.cols);
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t count = std::min(step, spec.rows - begin);
    quantal::dequantize(w, {begin, begin + count, 0, spec.cols}, dtype, scratch.mutable_data_ptr(),
                        spec.cols, quantal::stable_executor());
    Tensor panel = stable::narrow(scratch, 0, 0, count);
    Tensor out = stable::narrow(y, 1, begin, count);
    std::optional<Tensor> panel_bias;
    if (bias) panel_bias = stable::narrow(*bias, 0, begin, count);
    call("aten::linear", "out", x, panel, panel_bias, out);
  }
}

/// dx[:, c0:c1] = g @ w[:, c0:c1], a panel of columns over all rows at a time, so that each element
/// of dx is one reduction inside the framework's product.
void grad_by_panels(const PackedView& w, DType dtype, Tensor& g, Tensor& dx) {
  const auto& spec = w.spec;
  const auto element = static_cast<std::int64_t>(quantal::dtype_size(dtype));
  std::int64_t step = std::max(kMinPanelCols, kPanelBytes / (spec.rows * element));
  step = std::min(spec.cols, step / kColumnUnit * kColumnUnit);
  for (std::int64_t begin = 0; begin < spec.cols; begin += step) {
    const std::int64_t count = std::min(step, spec.cols - begin);
    Tensor panel = panel_scratch(g, spec.rows, count);
    quantal::dequantize(w, {0, spec.rows, begin, begin + count}, dtype, panel.mutable_data_ptr(),
                        count, quantal::stable_executor());
    Tensor out = stable::narrow(dx, 1, begin, count);
    call("aten::mm", "out", g, panel, out);
  }
}

// ------------------------------------------------------------------ CPU kernels

std::tuple<Tensor, Tensor, Tensor> packed_buffers(const Tensor& like, const PackedSpec& spec) {
  const PackedLayout layout = quantal::layout_of(spec);
  return {empty_like_of(like, {spec.rows, layout.code_bytes}, ScalarType::Byte),
          empty_like_of(like, {layout.stat_rows, layout.stat_bytes}, ScalarType::Byte),
          empty_like_of(like, {layout.shared_bytes}, ScalarType::Byte)};
}

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(Tensor weight, Ints spec_ints) {
  const PackedSpec spec = quantal::spec_from_ints(spec_ints);
  check_cpu("quantal::quantize: weight", weight);
  const DType dtype = weight_dtype("quantal::quantize: weight", weight.scalar_type());
  if (weight.dim() < 2 || weight.size(weight.dim() - 1) != spec.cols ||
      weight.numel() != quantal::checked_mul(spec.rows, spec.cols, "weight elements")) {
    quantal::fail(Errc::kShape, "quantal::quantize: weight has shape " + sizes_string(weight) +
                                    ", expected [" + std::to_string(spec.rows) + ", " +
                                    std::to_string(spec.cols) + "] of the spec");
  }
  const Tensor source = stable::contiguous(weight);
  auto [codes, stats, shared] = packed_buffers(weight, spec);
  stable::zero_(codes);
  stable::zero_(stats);
  stable::zero_(shared);
  const auto bytes = [](Tensor& t) { return static_cast<std::uint8_t*>(t.mutable_data_ptr()); };
  quantal::dialect_by_id(spec.dialect)
      .quantize(spec, dtype, source.const_data_ptr(), bytes(codes), bytes(stats), bytes(shared),
                quantal::stable_executor());
  return {codes, stats, shared};
}

Tensor dequantize_cpu(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints, ScalarType type) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const DType dtype = weight_dtype("quantal::dequantize: dtype", type);
  const PackedSpec& spec = w.view.spec;
  Tensor out = empty_like_of(codes, {spec.rows, spec.cols}, type);
  quantal::dequantize(w.view, {0, spec.rows, 0, spec.cols}, dtype, out.mutable_data_ptr(),
                      spec.cols, quantal::stable_executor());
  return out;
}

/// Checks a bias and returns it contiguous, in `type`, without history.
std::optional<Tensor> bias_as(const std::optional<Tensor>& bias, std::int64_t rows,
                              ScalarType type) {
  if (!bias || !bias->defined()) return std::nullopt;
  check_cpu("quantal::linear: bias", *bias);
  weight_dtype("quantal::linear: bias", bias->scalar_type());
  if (bias->dim() != 1 || bias->size(0) != rows) {
    quantal::fail(Errc::kShape, "quantal::linear: bias has shape " + sizes_string(*bias) +
                                    ", expected [" + std::to_string(rows) + "]");
  }
  return stable::contiguous(stable::to(detached(*bias), type));
}

Tensor linear_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                  Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  const ScalarType type = x.scalar_type();
  const DType dtype = weight_dtype("quantal::linear: x", type);
  Tensor rows = as_matrix("quantal::linear: x", x, spec.cols);
  const std::int64_t m = rows.size(0);
  Tensor y = empty_like_of(x, {m, spec.rows}, type);
  const bool packed = use_packed_product(spec, dtype, m);
  auto b = bias_as(bias, spec.rows, packed ? ScalarType::Float : type);
  if (m > 0 && packed) {
    const auto* b_data = b ? static_cast<const float*>(b->const_data_ptr()) : nullptr;
    quantal::matmul(w.view, dtype, rows.const_data_ptr(), m, b_data, y.mutable_data_ptr(),
                    quantal::stable_executor());
  } else if (m > 0) {
    linear_by_panels(w.view, dtype, rows, b, y);
  }
  const Ints sizes = sizes_with_last(x, spec.rows);
  return stable::view(y, {sizes.data(), sizes.size()});
}

/// The product of LLM.int8, forward only (quantal/kernels.h, matmul_int8).
Tensor linear_int8_cpu(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                       std::optional<Tensor> bias, Ints spec_ints, double threshold) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  const DType dtype = weight_dtype("quantal::linear_int8: x", x.scalar_type());
  Tensor rows = as_matrix("quantal::linear_int8: x", x, spec.cols);
  const std::int64_t m = rows.size(0);
  Tensor y = empty_like_of(x, {m, spec.rows}, x.scalar_type());
  auto b = bias_as(bias, spec.rows, ScalarType::Float);
  quantal::matmul_int8(w.view, dtype, rows.const_data_ptr(), m,
                       b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
                       static_cast<float>(threshold), y.mutable_data_ptr(),
                       quantal::stable_executor());
  const Ints sizes = sizes_with_last(x, spec.rows);
  return stable::view(y, {sizes.data(), sizes.size()});
}

Tensor linear_grad_input_cpu(Tensor grad, Tensor codes, Tensor stats, Tensor shared,
                             Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  const ScalarType type = grad.scalar_type();
  const DType dtype = weight_dtype("quantal::linear_grad_input: grad", type);
  Tensor rows = as_matrix("quantal::linear_grad_input: grad", grad, spec.rows);
  const std::int64_t m = rows.size(0);
  Tensor dx = empty_like_of(grad, {m, spec.cols}, type);
  if (m > 0 && use_packed_product(spec, dtype, m)) {
    quantal::matmul_transposed(w.view, dtype, rows.const_data_ptr(), m, dx.mutable_data_ptr(),
                               quantal::stable_executor());
  } else if (m > 0) {
    grad_by_panels(w.view, dtype, rows, dx);
  }
  const Ints sizes = sizes_with_last(grad, spec.cols);
  return stable::view(dx, {sizes.data(), sizes.size()});
}

// ------------------------------------------------------------------ meta kernels

/// A fresh contiguous tensor with the sizes of `t`, the last one replaced. Sizes may be symbolic
/// here and cannot be read through the stable ABI, so they travel inside views.
Tensor meta_with_last(const Tensor& t, std::int64_t last) {
  Tensor self = detached(t);
  const std::int64_t dim = self.dim();
  if (dim < 1) quantal::fail(Errc::kShape, "quantal: x is a scalar, expected [..., in_features]");
  Tensor one = stable::narrow(self, dim - 1, 0, 1);
  Ints sizes(static_cast<std::size_t>(dim), -1);
  sizes.back() = last;
  const Tensor wide = call("aten::expand", "", one, sizes, false);
  return stable::contiguous(wide);
}

std::tuple<Tensor, Tensor, Tensor> quantize_meta(Tensor weight, Ints spec) {
  return packed_buffers(weight, quantal::spec_from_ints(spec));
}
Tensor dequantize_meta(Tensor codes, Tensor, Tensor, Ints spec_ints, ScalarType type) {
  const PackedSpec spec = quantal::spec_from_ints(spec_ints);
  return empty_like_of(codes, {spec.rows, spec.cols}, type);
}
Tensor linear_meta(Tensor x, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints spec) {
  return meta_with_last(x, quantal::spec_from_ints(spec).rows);
}
Tensor linear_int8_meta(Tensor x, Tensor, Tensor, Tensor, std::optional<Tensor>, Ints spec,
                        double) {
  return meta_with_last(x, quantal::spec_from_ints(spec).rows);
}
Tensor linear_grad_input_meta(Tensor grad, Tensor, Tensor, Tensor, Ints spec) {
  return meta_with_last(grad, quantal::spec_from_ints(spec).cols);
}

}  // namespace

STABLE_TORCH_LIBRARY(quantal, m) {
  m.def("quantize(Tensor weight, int[] spec) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec) "
      "-> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor codes, Tensor stats, Tensor shared, Tensor? bias, int[] spec, "
      "float threshold) -> Tensor");
  m.def(
      "linear_grad_input(Tensor grad, Tensor codes, Tensor stats, Tensor shared, int[] spec) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_cpu));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("quantize", TORCH_BOX(&quantize_meta));
  m.impl("dequantize", TORCH_BOX(&dequantize_meta));
  m.impl("linear", TORCH_BOX(&linear_meta));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_meta));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input_meta));
}

// Packed weights as tensors and the differentiable product (linear_low_rank.cpp: with an adapter).
#include "quantal/torch/ops.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/result_block.h"
#include "torch/dispatch_op.h"
#include "torch/packed_product.h"
#include "torch/stable_executor.h"

namespace quantal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = std::vector<std::int64_t>;
using OptionalTensor = std::optional<at::Tensor>;

using LinearSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, const OptionalTensor&, at::IntArrayRef);
using Int8Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, const OptionalTensor&, at::IntArrayRef, double);
using QuantizeSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                                         at::IntArrayRef);
using DequantizeSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                       at::IntArrayRef, at::ScalarType);
using GradInputSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      const at::Tensor&, at::IntArrayRef);

at::Tensor call_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& stats,
                       const at::Tensor& shared, const OptionalTensor& bias, const Ints& spec) {
  static const auto op = find_op<LinearSignature>("quantal::linear");
  return op.call(x, codes, stats, shared, bias, spec);
}

at::Tensor call_linear_int8(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& stats,
                            const at::Tensor& shared, const OptionalTensor& bias, const Ints& spec,
                            double threshold) {
  static const auto op = find_op<Int8Signature>("quantal::linear_int8");
  return op.call(x, codes, stats, shared, bias, spec, threshold);
}

at::Tensor call_linear_int8_activations(const at::Tensor& x, const at::Tensor& codes,
                                        const at::Tensor& stats, const at::Tensor& shared,
                                        const OptionalTensor& bias, const Ints& spec) {
  static const auto op = find_op<LinearSignature>("quantal::linear_int8_activations");
  return op.call(x, codes, stats, shared, bias, spec);
}

at::Tensor call_grad_input(const at::Tensor& grad, const at::Tensor& codes, const at::Tensor& stats,
                           const at::Tensor& shared, const Ints& spec) {
  static const auto op = find_op<GradInputSignature>("quantal::linear_grad_input");
  return op.call(grad, codes, stats, shared, spec);
}

/// dx = g W, whose own gradient with respect to g is a product with W^T again.
struct GradInputFunction : public torch::autograd::Function<GradInputFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor& codes,
                            const at::Tensor& stats, const at::Tensor& shared, const Ints& spec) {
    ctx->save_for_backward({codes, stats, shared});
    ctx->saved_data["spec"] = spec;
    return call_grad_input(grad, codes, stats, shared, spec);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

/// Which product LinearFunction computes: that of LLM.int8 where there is a threshold.
struct Product {
  Activations activations = Activations::kExact;
  std::optional<double> threshold;
};

at::Tensor call_product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& stats,
                        const at::Tensor& shared, const OptionalTensor& bias, const Ints& spec,
                        const Product& product) {
  if (product.threshold) {
    return call_linear_int8(x, codes, stats, shared, bias, spec, *product.threshold);
  }
  if (product.activations == Activations::kInt8) {
    return call_linear_int8_activations(x, codes, stats, shared, bias, spec);
  }
  return call_linear(x, codes, stats, shared, bias, spec);
}

/// y = x W^T + bias. The gradient passes any rounding of x straight through.
struct LinearFunction : public torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& codes,
                            const at::Tensor& stats, const at::Tensor& shared,
                            const OptionalTensor& bias, const Ints& spec, const Product& product) {
    ctx->save_for_backward({codes, stats, shared});
    ctx->saved_data["spec"] = spec;
    if (bias) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    return call_product(x, codes, stats, shared, bias, spec, product);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Ints spec = ctx->saved_data["spec"].toIntVector();
    at::Tensor grad_x, grad_bias;
    if (ctx->needs_input_grad(0)) {
      grad_x = GradInputFunction::apply(grads[0], saved[0], saved[1], saved[2], spec);
    }
    const auto bias_dtype = ctx->saved_data.find("bias_dtype");
    // Index 4 counts tensors given to apply; without a bias there is no such tensor.
    if (bias_dtype != ctx->saved_data.end() && ctx->needs_input_grad(4)) {
      const auto rows = grads[0].reshape({-1, grads[0].size(-1)});
      grad_bias = rows.sum(0).to(bias_dtype->second.toScalarType());
    }
    return {grad_x, {}, {}, {}, grad_bias, {}, {}};
  }
};

variable_list GradInputFunction::backward(AutogradContext* ctx, const variable_list& grads) {
  const variable_list saved = ctx->get_saved_variables();
  const Ints spec = ctx->saved_data["spec"].toIntVector();
  return {LinearFunction::apply(grads[0], saved[0], saved[1], saved[2], OptionalTensor{}, spec,
                                Product{}),
          {},
          {},
          {},
          {}};
}

void check_bytes(const torch::Tensor& t, const char* what, std::int64_t bytes, at::Device place) {
  const std::string name = std::string("packed tensors: ") + what;
  if (t.scalar_type() != torch::kByte) {
    fail(Errc::kDtype, name + " is " + c10::toString(t.scalar_type()) + ", expected Byte");
  }
  if (t.device() != place) {
    fail(Errc::kDevice, name + " is on " + t.device().str() + ", expected " + place.str());
  }
  check_size(name + " bytes", static_cast<std::size_t>(t.numel()), static_cast<std::size_t>(bytes));
}

torch::Tensor bytes_tensor(at::IntArrayRef sizes) {
  return torch::zeros(sizes, torch::TensorOptions().dtype(torch::kByte));
}

/// Bytes whose pages are left to the threads that will write them.
torch::Tensor unwritten_bytes(at::IntArrayRef sizes) {
  torch::Tensor out = torch::empty(sizes, torch::TensorOptions().dtype(torch::kByte));
  prefer_large_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

/// A tensor over bytes that it owns.
torch::Tensor adopt(std::vector<std::uint8_t>&& bytes, at::IntArrayRef sizes) {
  if (bytes.empty()) return bytes_tensor(sizes);
  const auto owner = std::make_shared<std::vector<std::uint8_t>>(std::move(bytes));
  return torch::from_blob(
      owner->data(), sizes, [owner](void*) {}, torch::TensorOptions().dtype(torch::kByte));
}

/// A matrix to decode into; see `core/result_block.h`.
torch::Tensor empty_result(at::IntArrayRef sizes, torch::ScalarType dtype) {
  const auto options = torch::TensorOptions().dtype(dtype);
  const auto bytes =
      static_cast<std::size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (bytes < kSmallestResultBlock) return torch::empty(sizes, options);
  return torch::from_blob(
      take_result_block(bytes), sizes, [bytes](void* data) { release_result_block(data, bytes); },
      options);
}

/// Whether a product is part of a graph; the others need no node, which costs as much as a small
/// product.
bool is_recorded(const torch::Tensor& x, const torch::Tensor& bias) {
  return torch::GradMode::is_enabled() &&
         (x.requires_grad() || (bias.defined() && bias.requires_grad()));
}

Ints spec_ints(const PackedSpec& spec) {
  const auto ints = spec_to_ints(spec);
  return {ints.begin(), ints.end()};
}

torch::Tensor apply_linear(const torch::Tensor& x, const PackedTensors& w,
                           const torch::Tensor& bias, const Product& product) {
  const OptionalTensor optional_bias = bias.defined() ? OptionalTensor(bias) : std::nullopt;
  if (!is_recorded(x, bias)) {
    const at::AutoDispatchBelowAutograd below;
    return call_product(x, w.codes, w.stats, w.shared, optional_bias, spec_ints(w.spec), product);
  }
  return LinearFunction::apply(x, w.codes, w.stats, w.shared, optional_bias, spec_ints(w.spec),
                               product);
}

}  // namespace

torch::ScalarType to_torch(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return torch::kFloat;
    case DType::kF16:
      return torch::kHalf;
    case DType::kBF16:
      return torch::kBFloat16;
    case DType::kF64:
      return torch::kDouble;
    case DType::kU8:
      return torch::kByte;
    case DType::kI8:
      return torch::kChar;
    case DType::kI16:
      return torch::kShort;
    case DType::kI32:
      return torch::kInt;
    case DType::kI64:
      return torch::kLong;
    case DType::kBool:
      return torch::kBool;
    default:
      fail(Errc::kDtype, "torch: dtype " + std::string(dtype_name(dtype)) + " has no torch type");
  }
}

DType from_torch(torch::ScalarType type) {
  for (const DType d : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64, DType::kU8, DType::kI8,
                        DType::kI16, DType::kI32, DType::kI64, DType::kBool}) {
    if (to_torch(d) == type) return d;
  }
  fail(Errc::kDtype,
       std::string("torch: scalar type ") + c10::toString(type) + " has no dtype in quantal");
}

TensorView tensor_view(const torch::Tensor& t) {
  if (!t.device().is_cpu()) {
    fail(Errc::kDevice, "torch: tensor is on " + t.device().str() + ", expected cpu");
  }
  if (!t.is_contiguous()) fail(Errc::kShape, "torch: tensor is not contiguous");
  return {from_torch(t.scalar_type()),
          t.sizes().vec(),
          {static_cast<const std::uint8_t*>(t.const_data_ptr()), t.nbytes()}};
}

std::int64_t PackedTensors::nbytes() const {
  return static_cast<std::int64_t>(codes.nbytes() + stats.nbytes() + shared.nbytes());
}

void PackedTensors::check() const {
  const PackedLayout layout = layout_of(spec);
  check_bytes(codes, "codes", spec.rows * layout.code_bytes, codes.device());
  check_bytes(stats, "stats", layout.stat_rows * layout.stat_bytes, codes.device());
  check_bytes(shared, "shared", layout.shared_bytes, codes.device());
}

PackedView PackedTensors::view() const {
  check();
  return {spec, tensor_view(codes).bytes, tensor_view(stats).bytes, tensor_view(shared).bytes};
}

PackedTensors PackedTensors::cpu() const { return {spec, codes.cpu(), stats.cpu(), shared.cpu()}; }

PackedTensors empty_packed(const PackedSpec& spec) {
  const PackedLayout layout = layout_of(spec);
  return {spec, bytes_tensor({spec.rows, layout.code_bytes}),
          bytes_tensor({layout.stat_rows, layout.stat_bytes}), bytes_tensor({layout.shared_bytes})};
}

PackedTensors to_tensors(const PackedView& w) {
  check_packed(w);
  PackedTensors out = empty_packed(w.spec);
  std::ranges::copy(w.codes, out.codes.mutable_data_ptr<std::uint8_t>());
  std::ranges::copy(w.stats, out.stats.mutable_data_ptr<std::uint8_t>());
  std::ranges::copy(w.shared, out.shared.mutable_data_ptr<std::uint8_t>());
  return out;
}

PackedTensors to_tensors(PackedMatrix&& w) {
  check_packed(w.view());
  const PackedLayout layout = layout_of(w.spec);
  return {w.spec, adopt(std::move(w.codes), {w.spec.rows, layout.code_bytes}),
          adopt(std::move(w.stats), {layout.stat_rows, layout.stat_bytes}),
          adopt(std::move(w.shared), {layout.shared_bytes})};
}

PackedTensors quantize(const torch::Tensor& weight, const QuantizeOptions& options) {
  if (weight.dim() < 2) {
    fail(Errc::kShape, "quantize: weight has " + std::to_string(weight.dim()) +
                           " dimensions, expected at least 2");
  }
  const Dialect& dialect = dialect_of(options.method);
  const std::int64_t cols = weight.size(-1);
  const std::int64_t rows = cols == 0 ? 0 : weight.numel() / cols;
  return quantize(weight, dialect.make_spec(rows, cols, options));
}

PackedTensors quantize(const torch::Tensor& weight, const PackedSpec& spec) {
  const torch::NoGradGuard no_grad;
  if (!weight.is_cpu()) {
    static const auto op = find_op<QuantizeSignature>("quantal::quantize");
    const auto [codes, stats, shared] = op.call(weight.detach(), spec_ints(spec));
    return {spec, codes, stats, shared};
  }
  const torch::Tensor source = weight.contiguous();
  const TensorView view = tensor_view(source);
  if (weight.dim() < 2 || weight.size(-1) != spec.cols ||
      weight.numel() != checked_mul(spec.rows, spec.cols, "quantize: weight")) {
    fail(Errc::kShape, "quantize: weight has shape " + shape_string(view.shape) + ", expected [" +
                           std::to_string(spec.rows) + ", " + std::to_string(spec.cols) +
                           "] of the spec");
  }
  const PackedLayout layout = layout_of(spec);
  PackedTensors out{spec, unwritten_bytes({spec.rows, layout.code_bytes}),
                    unwritten_bytes({layout.stat_rows, layout.stat_bytes}),
                    bytes_tensor({layout.shared_bytes})};
  dialect_by_id(spec.dialect)
      .quantize(spec, view.dtype, view.bytes.data(), out.codes.mutable_data_ptr<std::uint8_t>(),
                out.stats.mutable_data_ptr<std::uint8_t>(),
                out.shared.mutable_data_ptr<std::uint8_t>(), stable_executor());
  return out;
}

torch::Tensor dequantize(const PackedTensors& w, torch::ScalarType dtype) {
  if (!w.codes.is_cpu()) {
    static const auto op = find_op<DequantizeSignature>("quantal::dequantize");
    return op.call(w.codes, w.stats, w.shared, spec_ints(w.spec), dtype);
  }
  const PackedView view = w.view();
  const DType out_dtype = from_torch(dtype);
  torch::Tensor out = empty_result({w.spec.rows, w.spec.cols}, dtype);
  dequantize(view, {0, w.spec.rows, 0, w.spec.cols}, out_dtype, out.mutable_data_ptr(), w.spec.cols,
             stable_executor());
  return out;
}

torch::Tensor row_square_sums(const PackedTensors& w, torch::ScalarType dtype) {
  static const auto op = find_op<DequantizeSignature>("quantal::row_square_sums");
  return op.call(w.codes, w.stats, w.shared, spec_ints(w.spec), dtype);
}

double relative_error(const torch::Tensor& weight, const PackedTensors& on_device) {
  const torch::NoGradGuard no_grad;
  const PackedTensors w = on_device.cpu();
  const auto& spec = w.spec;
  const torch::Tensor matrix = weight.cpu().reshape({spec.rows, spec.cols});
  const std::int64_t step = std::clamp<std::int64_t>((1 << 20) / spec.cols, 1, spec.rows);
  torch::Tensor values = torch::empty({step, spec.cols});
  const PackedView view = w.view();
  double difference = 0, norm = 0;
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t count = std::min(step, spec.rows - begin);
    dequantize(view, {begin, begin + count, 0, spec.cols}, DType::kF32, values.mutable_data_ptr(),
               spec.cols, stable_executor());
    const auto rows = matrix.narrow(0, begin, count).to(torch::kFloat);
    const auto error = (rows - values.narrow(0, 0, count)).to(torch::kDouble);
    difference += error.square_().sum().item<double>();
    norm += rows.to(torch::kDouble).square_().sum().item<double>();
  }
  return norm > 0 ? std::sqrt(difference / norm) : 0;
}

torch::Tensor linear(const torch::Tensor& x, const PackedTensors& w, const torch::Tensor& bias) {
  return apply_linear(x, w, bias, {});
}

torch::Tensor linear_grad_input(const torch::Tensor& grad, const PackedTensors& w) {
  const Ints spec = spec_ints(w.spec);
  if (torch::GradMode::is_enabled() && grad.requires_grad()) {
    return GradInputFunction::apply(grad, w.codes, w.stats, w.shared, spec);
  }
  const at::AutoDispatchBelowAutograd below;
  return call_grad_input(grad, w.codes, w.stats, w.shared, spec);
}

torch::Tensor linear_int8(const torch::Tensor& x, const PackedTensors& w, const torch::Tensor& bias,
                          double threshold) {
  return apply_linear(x, w, bias, {.threshold = threshold});
}

torch::Tensor linear_int8_activations(const torch::Tensor& x, const PackedTensors& w,
                                      const torch::Tensor& bias) {
  return apply_linear(x, w, bias, {.activations = Activations::kInt8, .threshold = {}});
}

}  // namespace quantal

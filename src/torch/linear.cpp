#include "quantal/torch/linear.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <set>
#include <string>

#include "torch/merge_state.h"

namespace quantal {
namespace {

std::string form_name(const PackedSpec& spec) {
  return std::string(dialect_by_id(spec.dialect).name) + " " + std::to_string(spec.bits) +
         "-bit g" + std::to_string(spec.group_size);
}

std::string matrix_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

void check_bias(const char* where, const torch::Tensor& bias, std::int64_t rows) {
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != rows)) {
    fail(Errc::kShape, std::string(where) + ": bias has shape " + shape_string(bias.sizes().vec()) +
                           ", expected [" + std::to_string(rows) + "]");
  }
}

void check_weight(const char* where, const torch::Tensor& weight, std::int64_t rows,
                  std::int64_t cols) {
  if (weight.dim() != 2 || weight.size(0) != rows || weight.size(1) != cols) {
    fail(Errc::kShape, std::string(where) + ": weight has shape " +
                           shape_string(weight.sizes().vec()) + ", expected " +
                           matrix_text(rows, cols));
  }
}

}  // namespace

// ------------------------------------------------------------------ QuantizedLayer

QuantizedLayerImpl::QuantizedLayerImpl(const std::string& name, std::int64_t in, std::int64_t out)
    : torch::nn::Module(name), in_features_(in), out_features_(out) {}

std::int64_t QuantizedLayerImpl::nbytes() const {
  std::int64_t total = 0;
  for (const auto& t : parameters()) total += static_cast<std::int64_t>(t.nbytes());
  for (const auto& t : buffers()) total += static_cast<std::int64_t>(t.nbytes());
  return total;
}

void QuantizedLayerImpl::set_bias(const torch::Tensor& values) {
  check_bias(name().c_str(), values, out_features_);
  if (parameters_.contains("bias")) parameters_.erase("bias");
  bias.reset();
  if (values.defined()) bias = register_parameter("bias", values.detach(), values.requires_grad());
}

// ------------------------------------------------------------------ QuantizedLinear

QuantizedLinearImpl::QuantizedLinearImpl(PackedTensors packed, torch::Tensor bias_values,
                                         torch::ScalarType compute_type)
    : QuantizedLayerImpl("QuantizedLinear", packed.spec.cols, packed.spec.rows),
      compute_dtype(compute_type),
      spec_(packed.spec) {
  packed.check();
  check_bias("QuantizedLinear", bias_values, spec_.rows);
  if (!is_weight_dtype(from_torch(compute_type))) {
    fail(Errc::kDtype, std::string("QuantizedLinear: compute_dtype is ") +
                           c10::toString(compute_type) + ", expected Float, Half or BFloat16");
  }
  codes = register_parameter("codes", packed.codes, /*requires_grad=*/false);
  stats = register_parameter("stats", packed.stats, /*requires_grad=*/false);
  shared = register_buffer("shared", packed.shared);
  const auto ints = spec_to_ints(spec_);
  register_buffer("spec", torch::tensor(std::vector<std::int64_t>(ints.begin(), ints.end())));
  set_bias(bias_values);
}

torch::Tensor QuantizedLinearImpl::forward(const torch::Tensor& x) {
  const torch::Tensor wide = x.to(compute_dtype);
  const torch::Tensor y = int8_threshold ? linear_int8(wide, packed(), bias, *int8_threshold)
                          : activations == Activations::kInt8
                              ? linear_int8_activations(wide, packed(), bias)
                              : linear(wide, packed(), bias);
  return y.to(x.scalar_type());
}

void QuantizedLinearImpl::quantize_weights(const torch::Tensor& weights) {
  check_weight("QuantizedLinear", weights, spec_.rows, spec_.cols);
  set_packed(quantize(weights, spec_));
}

void QuantizedLinearImpl::set_packed(PackedTensors packed) {
  packed.check();
  if (spec_to_ints(packed.spec) != spec_to_ints(spec_)) {
    fail(Errc::kShape, "QuantizedLinear: packed tensors are " + form_name(packed.spec) + " " +
                           matrix_text(packed.spec.rows, packed.spec.cols) + ", expected " +
                           form_name(spec_) + " " + matrix_text(spec_.rows, spec_.cols));
  }
  codes.set_data(packed.codes);
  stats.set_data(packed.stats);
  shared.set_data(packed.shared);
}

torch::Tensor QuantizedLinearImpl::weight() const {
  return dequantize(packed(), to_torch(spec_.value_dtype));
}

std::int64_t QuantizedLinearImpl::nbytes() const {
  const auto bias_bytes = bias.defined() ? static_cast<std::int64_t>(bias.nbytes()) : 0;
  return packed().nbytes() + bias_bytes;
}

void QuantizedLinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  to(device, non_blocking);
  to(dtype, non_blocking);
}

void QuantizedLinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  const torch::NoGradGuard no_grad;
  if (bias.defined()) bias.set_data(bias.to(dtype, non_blocking));
}

void QuantizedLinearImpl::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

void QuantizedLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "quantal::QuantizedLinear(in_features=" << in_features()
         << ", out_features=" << out_features() << ", bias=" << (bias.defined() ? "true" : "false")
         << ", " << form_name(spec_)
         << (activations == Activations::kInt8 ? ", int8 activations" : "") << ")";
}

// ------------------------------------------------------------------ Linear

LinearImpl::LinearImpl(std::int64_t in, std::int64_t out, bool with_bias, torch::ScalarType dtype,
                       Init init)
    : torch::nn::Module("Linear"), in_features(in), out_features(out) {
  const auto options = torch::TensorOptions().dtype(dtype);
  weight = register_parameter("weight", torch::empty({out, in}, options));
  if (with_bias) bias = register_parameter("bias", torch::empty({out}, options));
  if (init == Init::kNone) return;
  const torch::NoGradGuard no_grad;
  const double bound = in > 0 ? 1 / std::sqrt(static_cast<double>(in)) : 0;
  weight.uniform_(-bound, bound);
  if (bias.defined()) bias.uniform_(-bound, bound);
}

LinearImpl::LinearImpl(QuantizedLinear layer)
    : torch::nn::Module("Linear"),
      in_features(layer->in_features()),
      out_features(layer->out_features()) {
  set_quantized(std::move(layer));
}

LinearImpl::LinearImpl(std::shared_ptr<QuantizedLayerImpl> layer)
    : torch::nn::Module("Linear"),
      in_features(layer->in_features()),
      out_features(layer->out_features()) {
  set_custom(std::move(layer));
}

std::shared_ptr<QuantizedLayerImpl> LinearImpl::quantized() const {
  return packed ? std::shared_ptr<QuantizedLayerImpl>(packed) : custom;
}

torch::Device LinearImpl::device() const {
  if (packed) return packed->codes.device();
  if (!custom) return weight.device();
  const auto parameters = custom->parameters();
  const auto tensors = parameters.empty() ? custom->buffers() : parameters;
  return tensors.empty() ? torch::Device(torch::kCPU) : tensors.front().device();
}

torch::Tensor LinearImpl::current_bias() const {
  const auto layer = quantized();
  return layer ? layer->bias : bias;
}

torch::Tensor LinearImpl::base(const torch::Tensor& x) const {
  const auto layer = quantized();
  return layer ? layer->forward(x) : torch::linear(x, weight, bias);
}

torch::Tensor LinearImpl::dense_weight() const {
  if (packed) return dequantize(packed->packed(), torch::kFloat);
  return (custom ? custom->dequantize_weights() : weight.detach()).to(torch::kFloat);
}

void LinearImpl::drop_weight() {
  if (weight.defined()) parameters_.erase("weight");
  if (bias.defined()) parameters_.erase("bias");
  weight.reset();
  bias.reset();
  if (packed) unregister_module("packed");
  if (custom) unregister_module("custom");
  packed.reset();
  custom.reset();
  merge_state.reset();
  row_squares_.reset();
  row_squares_of_.reset();
}

void LinearImpl::set_form(std::shared_ptr<QuantizedLayerImpl> layer, const char* child) {
  if (layer->in_features() != in_features || layer->out_features() != out_features) {
    fail(Errc::kShape, "Linear: quantized layer is " +
                           matrix_text(layer->out_features(), layer->in_features()) +
                           ", expected " + matrix_text(out_features, in_features));
  }
  drop_weight();
  register_module(child, layer);
  layer->train(is_training());
}

void LinearImpl::set_quantized(QuantizedLinear layer) {
  set_form(layer.ptr(), "packed");
  packed = layer.ptr();
}

void LinearImpl::set_custom(std::shared_ptr<QuantizedLayerImpl> layer) {
  set_form(layer, "custom");
  custom = std::move(layer);
}

void LinearImpl::set_dense(torch::Tensor new_weight, torch::Tensor new_bias) {
  check_weight("Linear", new_weight, out_features, in_features);
  check_bias("Linear", new_bias, out_features);
  drop_weight();
  weight = register_parameter("weight", new_weight.detach(), new_weight.requires_grad());
  if (new_bias.defined()) {
    bias = register_parameter("bias", new_bias.detach(), new_bias.requires_grad());
  }
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "quantal::Linear(in_features=" << in_features << ", out_features=" << out_features
         << ", bias=" << (current_bias().defined() ? "true" : "false")
         << (packed   ? ", " + form_name(packed->spec())
             : custom ? ", " + custom->name()
                      : "");
  for (const auto& [name, adapter] : loras_) {
    stream << ", " << (adapter->is_dora() ? "dora" : "lora") << " '" << name
           << "' r=" << adapter->rank();
  }
  stream << ")";
}

// ------------------------------------------------------------------ whole models

std::vector<std::pair<std::string, std::shared_ptr<LinearImpl>>> named_linears(
    torch::nn::Module& model) {
  std::vector<std::pair<std::string, std::shared_ptr<LinearImpl>>> out;
  std::set<const LinearImpl*> seen;
  for (const auto& item : model.named_modules()) {
    auto layer = std::dynamic_pointer_cast<LinearImpl>(item.value());
    if (layer && seen.insert(layer.get()).second) out.emplace_back(item.key(), layer);
  }
  return out;
}

std::int64_t storage_bytes(const torch::nn::Module& model) {
  std::set<const void*> seen;
  std::int64_t total = 0;
  const auto add = [&](const torch::Tensor& t) {
    if (t.defined() && seen.insert(t.storage().unsafeGetStorageImpl()).second) {
      total += static_cast<std::int64_t>(t.storage().nbytes());
    }
  };
  for (const auto& t : model.parameters()) add(t);
  for (const auto& t : model.buffers()) add(t);
  return total;
}

}  // namespace quantal

#include "quantal/torch/linear.h"

#include <torch/torch.h>

#include <cmath>
#include <ostream>
#include <set>
#include <string>

namespace quantal {
namespace {

std::string form_name(const PackedSpec& spec) {
  return std::string(dialect_by_id(spec.dialect).name) + " " + std::to_string(spec.bits) +
         "-bit g" + std::to_string(spec.group_size);
}

void check_bias(const char* where, const torch::Tensor& bias, std::int64_t rows) {
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != rows)) {
    fail(Errc::kShape, std::string(where) + ": bias has shape " + shape_string(bias.sizes().vec()) +
                           ", expected [" + std::to_string(rows) + "]");
  }
}

}  // namespace

// ------------------------------------------------------------------ QuantizedLinear

QuantizedLinearImpl::QuantizedLinearImpl(PackedTensors packed, torch::Tensor bias_values,
                                         torch::ScalarType compute_type)
    : torch::nn::Module("QuantizedLinear"), compute_dtype(compute_type), spec_(packed.spec) {
  packed.view();  // checks
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
  if (bias_values.defined()) {
    bias = register_parameter("bias", bias_values.detach(), bias_values.requires_grad());
  }
}

torch::Tensor QuantizedLinearImpl::forward(const torch::Tensor& x) {
  return linear(x.to(compute_dtype), packed(), bias).to(x.scalar_type());
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
         << ", " << form_name(spec_) << ")";
}

// ------------------------------------------------------------------ Lora

LoraImpl::LoraImpl(std::int64_t in_features, std::int64_t out_features, std::int64_t r,
                   double scaling_factor, double dropout_rate)
    : torch::nn::Module("Lora"), scaling(scaling_factor), dropout(dropout_rate) {
  A = register_parameter("A", torch::empty({r, in_features}));
  B = register_parameter("B", torch::zeros({out_features, r}));
  const torch::NoGradGuard no_grad;
  const double bound = 1 / std::sqrt(static_cast<double>(in_features));
  A.uniform_(-bound, bound);
}

torch::Tensor LoraImpl::forward(const torch::Tensor& x) {
  torch::Tensor h = x.to(A.scalar_type());
  if (dropout > 0 && is_training()) h = torch::dropout(h, dropout, /*train=*/true);
  return (torch::linear(torch::linear(h, A), B) * scaling).to(x.scalar_type());
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
  packed = register_module("packed", layer.ptr());
}

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  torch::Tensor y = packed ? packed->forward(x) : torch::linear(x, weight, bias);
  return lora ? y + lora->forward(x) : y;
}

void LinearImpl::drop_dense() {
  if (weight.defined()) parameters_.erase("weight");
  if (bias.defined()) parameters_.erase("bias");
  weight.reset();
  bias.reset();
}

void LinearImpl::set_quantized(QuantizedLinear layer) {
  if (layer->in_features() != in_features || layer->out_features() != out_features) {
    fail(Errc::kShape, "Linear: quantized layer is [" + std::to_string(layer->out_features()) +
                           ", " + std::to_string(layer->in_features()) + "], expected [" +
                           std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
  }
  drop_dense();
  if (packed) unregister_module("packed");
  packed = register_module("packed", layer.ptr());
  packed->train(is_training());
}

void LinearImpl::set_dense(torch::Tensor new_weight, torch::Tensor new_bias) {
  if (new_weight.dim() != 2 || new_weight.size(0) != out_features ||
      new_weight.size(1) != in_features) {
    fail(Errc::kShape, "Linear: weight has shape " + shape_string(new_weight.sizes().vec()) +
                           ", expected [" + std::to_string(out_features) + ", " +
                           std::to_string(in_features) + "]");
  }
  check_bias("Linear", new_bias, out_features);
  drop_dense();
  if (packed) unregister_module("packed");
  packed.reset();
  weight = register_parameter("weight", new_weight.detach(), new_weight.requires_grad());
  if (new_bias.defined()) {
    bias = register_parameter("bias", new_bias.detach(), new_bias.requires_grad());
  }
}

void LinearImpl::set_lora(Lora layer) {
  if (layer->A.size(1) != in_features || layer->B.size(0) != out_features) {
    fail(Errc::kShape, "Linear: LoRA is [" + std::to_string(layer->B.size(0)) + ", " +
                           std::to_string(layer->A.size(1)) + "], expected [" +
                           std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
  }
  remove_lora();
  lora = register_module("lora", layer.ptr());
  lora->train(is_training());
}

void LinearImpl::remove_lora() {
  if (lora) unregister_module("lora");
  lora.reset();
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "quantal::Linear(in_features=" << in_features << ", out_features=" << out_features
         << ", bias=" << (current_bias().defined() ? "true" : "false")
         << (packed ? ", " + form_name(packed->spec()) : "")
         << (lora ? ", lora r=" + std::to_string(lora->rank()) : "") << ")";
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

// Adapters of a linear layer: LoRA and DoRA.
#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "quantal/torch/linear.h"
#include "torch/linear_low_rank.h"
#include "torch/merge_state.h"

namespace quantal {
namespace {

/// Metal has no float64.
torch::ScalarType widest_float(const torch::Tensor& t) {
  return t.is_mps() ? torch::kFloat : torch::kDouble;
}

bool is_float_on_cpu(const torch::Tensor& t) {
  const auto type = t.scalar_type();
  return t.device().is_cpu() &&
         (type == torch::kFloat || type == torch::kHalf || type == torch::kBFloat16);
}

/// Whether a call is the exact product and plain LoRA, on the CPU: linear_low_rank.
bool adds_in_place(const QuantizedLinearImpl& base, const LoraImpl& adapter,
                   const torch::Tensor& x) {
  return !adapter.is_dora() && !base.int8_threshold && base.activations == Activations::kExact &&
         base.codes.device().is_cpu() && is_float_on_cpu(x) && is_float_on_cpu(adapter.A) &&
         is_float_on_cpu(adapter.B) && adapter.A.scalar_type() == adapter.B.scalar_type() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

}  // namespace

// ------------------------------------------------------------------ Lora

LoraImpl::LoraImpl(std::int64_t in_features, std::int64_t out_features, std::int64_t r,
                   double scaling_factor, double dropout_rate, torch::Device device)
    : torch::nn::Module("Lora"), scaling(scaling_factor), dropout(dropout_rate) {
  const double bound = 1 / std::sqrt(static_cast<double>(in_features));
  const torch::Tensor drawn = torch::empty({r, in_features}).uniform_(-bound, bound);
  A = register_parameter("A", drawn.to(device));
  B = register_parameter("B", torch::zeros({out_features, r}).to(device));
}

torch::Tensor LoraImpl::drop(const torch::Tensor& x) const {
  return dropout > 0 && is_training() ? torch::dropout(x, dropout, /*train=*/true) : x;
}

torch::Tensor LoraImpl::forward(const torch::Tensor& x) {
  const torch::Tensor h = drop(x.to(A.scalar_type()));
  return (torch::linear(torch::linear(h, A), B) * scaling).to(x.scalar_type());
}

torch::Tensor LoraImpl::delta() const {
  return torch::matmul(B.to(torch::kFloat), A.to(torch::kFloat)) * scaling;
}

void LoraImpl::set_magnitude(const torch::Tensor& values) {
  if (values.dim() != 1 || values.size(0) != B.size(0)) {
    fail(Errc::kShape, "Lora: magnitude has shape " + shape_string(values.sizes().vec()) +
                           ", expected [" + std::to_string(B.size(0)) + "]");
  }
  if (is_dora()) parameters_.erase("magnitude");
  magnitude = register_parameter("magnitude", values.detach().to(B.device(), torch::kFloat).clone(),
                                 B.requires_grad());
}

// ------------------------------------------------------------------ Linear

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  if (active_.empty() || (merge_state && !merge_state->names.empty())) return base(x);
  const auto first = lora(active_.front());
  if (active_.size() == 1 && packed && adds_in_place(*packed, *first, x)) {
    return linear_low_rank(x, first->drop(x), packed->packed(), packed->bias, packed->compute_dtype,
                           {first->A, first->B, first->scaling});
  }
  torch::Tensor y = base(x);
  for (const std::string& name : active_) {
    const auto adapter = lora(name);
    y = adapter->is_dora() ? add_dora(x, y, *adapter) : y + adapter->forward(x);
  }
  return y;
}

torch::Tensor LinearImpl::add_dora(const torch::Tensor& x, const torch::Tensor& y,
                                   LoraImpl& adapter) const {
  const torch::Tensor scale = adapter.magnitude / weight_norm(adapter);
  const bool drops = adapter.dropout > 0 && adapter.is_training();
  const torch::Tensor wide = x.to(adapter.A.scalar_type());
  const torch::Tensor h = adapter.drop(wide);
  torch::Tensor product = drops ? base(h) : y;
  const torch::Tensor offset = current_bias();
  if (offset.defined()) product = product - offset;
  const torch::Tensor low = torch::linear(torch::linear(h, adapter.A), adapter.B);
  const torch::Tensor change = (scale - 1) * product + scale * low * adapter.scaling;
  return y + change.to(y.scalar_type());
}

torch::Tensor LinearImpl::row_squares() const {
  if (!packed) {
    const torch::Tensor w = custom ? custom->dequantize_weights() : weight.detach();
    return at::linalg_vector_norm(w, 2, at::IntArrayRef{1}, false, widest_float(w)).square();
  }
  const torch::Tensor& codes = packed->codes;
  const auto version = static_cast<std::int64_t>(codes._version());
  const bool known = row_squares_of_.defined() && row_squares_version_ == version &&
                     row_squares_of_.const_data_ptr() == codes.const_data_ptr();
  if (!known) {
    row_squares_ = quantal::row_square_sums(packed->packed(), widest_float(codes));
    row_squares_of_ = codes.detach();  // its bytes stay, so that their address stays theirs
    row_squares_version_ = version;
  }
  return row_squares_;
}

/// Row n of the square is |W_n|^2 + 2 s (W A^T)_n . B_n + s^2 B_n (A A^T) B_n^T.
torch::Tensor LinearImpl::weight_norm(const LoraImpl& adapter) const {
  const torch::NoGradGuard no_grad;
  const torch::Tensor a = adapter.A.to(torch::kFloat), b = adapter.B.to(torch::kFloat);
  const double s = adapter.scaling;
  const torch::Tensor wa =
      packed ? quantal::linear(a, packed->packed()) : torch::linear(a, dense_weight());
  const auto sum = [](const torch::Tensor& t) {
    return t.sum(at::IntArrayRef{1}, false, widest_float(t));
  };
  const torch::Tensor cross = sum(wa.t() * b);
  const torch::Tensor gram = sum(torch::matmul(b, torch::matmul(a, a.t())) * b);
  const torch::Tensor squares = row_squares() + 2 * s * cross + s * s * gram;
  return squares.clamp_min(0).sqrt().to(torch::kFloat);
}

void LinearImpl::set_lora(Lora layer, const std::string& name) {
  if (layer->A.size(1) != in_features || layer->B.size(0) != out_features) {
    fail(Errc::kShape, "Linear: LoRA is [" + std::to_string(layer->B.size(0)) + ", " +
                           std::to_string(layer->A.size(1)) + "], expected [" +
                           std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
  }
  if (name.empty() || name.find('.') != std::string::npos) {
    fail(Errc::kConfig, "Linear: name of an adapter is '" + name + "', expected one without dots");
  }
  layer->train(is_training());
  for (auto& [known, adapter] : loras_) {
    if (known != name) continue;
    adapter = replace_module("lora_" + name, layer.ptr());
    return;
  }
  loras_.emplace_back(name, register_module("lora_" + name, layer.ptr()));
  if (loras_.size() == 1) active_ = {name};
}

void LinearImpl::remove_lora(const std::string& name) {
  const auto goes = [&](const std::string& known) { return name.empty() || known == name; };
  for (const auto& [known, adapter] : loras_) {
    if (goes(known)) unregister_module("lora_" + known);
  }
  std::erase_if(loras_, [&](const auto& entry) { return goes(entry.first); });
  std::erase_if(active_, goes);
}

std::shared_ptr<LoraImpl> LinearImpl::lora(const std::string& name) const {
  for (const auto& [known, adapter] : loras_) {
    if (known == name) return adapter;
  }
  return nullptr;
}

void LinearImpl::set_active(const std::vector<std::string>& names) {
  active_.clear();
  for (const std::string& name : names) {
    if (lora(name)) active_.push_back(name);
  }
}

}  // namespace quantal

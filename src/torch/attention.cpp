// Attention for C++ programs: autograd, autocast and the choice between the kernels and torch's.
#include "quantal/torch/attention.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "quantal/torch/ops.h"
#include "torch/dispatch_op.h"

namespace quantal {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                    const OptionalTensor&, bool, double, bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                             const Tensor&, const Tensor&,
                                                             const OptionalTensor&, const Tensor&,
                                                             const Tensor&, bool, double);
using RunsSignature = Tensor(const Tensor&);

std::tuple<Tensor, Tensor> call_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& runs, const AttentionShape& shape,
                                        bool with_gradient) {
  static const auto op = find_op<ForwardSignature>("quantal::attention");
  return op.call(q, k, v, runs, shape.causal, shape.scale, with_gradient);
}

/// The gradients of q, k and v, which have none themselves.
struct AttentionGradFunction : public torch::autograd::Function<AttentionGradFunction> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& q,
                               const Tensor& k, const Tensor& v, const OptionalTensor& runs,
                               const Tensor& out, const Tensor& lse, bool causal, double scale) {
    static const auto op = find_op<BackwardSignature>("quantal::attention_backward");
    const auto [dq, dk, dv] = op.call(grad, q, k, v, runs, out, lse, causal, scale);
    return {dq, dk, dv};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    fail(Errc::kUnsupported,
         "attention: is differentiated twice, expected once (torch::scaled_dot_product_attention "
         "of float64 can be)");
  }
};

struct AttentionFunction : public torch::autograd::Function<AttentionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& runs, const AttentionShape& shape) {
    const auto [out, lse] = call_forward(q, k, v, runs, shape, true);
    ctx->save_for_backward({q, k, v, out, lse, runs.value_or(Tensor())});
    ctx->saved_data["causal"] = shape.causal;
    ctx->saved_data["scale"] = static_cast<double>(shape.scale);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const OptionalTensor runs = s[5].defined() ? OptionalTensor(s[5]) : std::nullopt;
    variable_list found = AttentionGradFunction::apply(grads[0], s[0], s[1], s[2], runs, s[3], s[4],
                                                       ctx->saved_data["causal"].toBool(),
                                                       ctx->saved_data["scale"].toDouble());
    found.resize(5);  // of runs and shape: none
    return found;
  }
};

void check_like(const char* name, const Tensor& t, const Tensor& q) {
  const std::string what = std::string("attention: ") + name + " is ";
  if (t.scalar_type() != q.scalar_type()) {
    fail(Errc::kDtype, what + c10::toString(t.scalar_type()) + ", expected " +
                           c10::toString(q.scalar_type()) + " as q");
  }
  if (t.device() != q.device()) {
    fail(Errc::kDevice, what + "on " + t.device().str() + ", expected " + q.device().str());
  }
}

/// As autocast has torch's attention.
Tensor autocast(const Tensor& t) {
  const auto device = t.device().type();
  const bool known = at::autocast::is_autocast_available(device);
  if (!known || !at::autocast::is_autocast_enabled(device)) return t;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

/// attention_refusal, which throws for sizes that do not belong together.
std::string refusal_of(const Tensor& q, const AttentionShape& shape, bool with_gradient) {
  const auto type = q.scalar_type();
  const bool known = type == torch::kFloat || type == torch::kHalf || type == torch::kBFloat16;
  return attention_refusal(shape, known ? from_torch(type) : DType::kF64, with_gradient);
}

/// [queries, keys]: true where a causal attention looks.
Tensor causal_mask(const AttentionShape& s, const Tensor& like) {
  const auto options = torch::TensorOptions().dtype(torch::kBool).device(like.device());
  return torch::ones({s.queries, s.keys}, options).tril_(s.keys - s.queries);
}

/// `mask` where a causal attention looks too.
Tensor causal_part(const Tensor& mask, const AttentionShape& s) {
  if (s.queries == 1) return mask;
  const Tensor seen = causal_mask(s, mask);
  if (mask.scalar_type() == torch::kBool) return mask.logical_and(seen);
  return mask.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity());
}

/// The runs of keys that queries see under a mask; none for another mask.
OptionalTensor runs_of(const Tensor& mask, const AttentionShape& s) {
  const bool by_head = mask.dim() > 2 && mask.size(-3) != 1;
  if (mask.scalar_type() != torch::kBool || !mask.device().is_cpu() || by_head) return {};
  static const auto op = find_op<RunsSignature>("quantal::mask_runs");
  const Tensor runs = op.call(mask.expand({s.batch, 1, s.queries, s.keys}));
  return runs.dim() == 3 ? OptionalTensor(runs) : std::nullopt;
}

Tensor torch_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionShape& s,
                       const Tensor& mask, std::optional<double> scale) {
  const bool grouped = s.heads > s.kv_heads;
  if (grouped && s.queries == 1 && !mask.defined()) {
    // One position sees all keys: heads that share them are rows of one query, without copies.
    const Tensor rows = q.reshape({s.batch, s.kv_heads, s.heads / s.kv_heads, s.dim});
    return at::scaled_dot_product_attention(rows, k, v, {}, 0, false, scale).reshape(q.sizes());
  }
  OptionalTensor given = mask.defined() ? OptionalTensor(mask) : std::nullopt;
  const bool hides = s.causal && s.queries > 1;
  // torch's is_causal begins at the first key
  if (hides && s.keys > s.queries) given = causal_mask(s, q);
  return at::scaled_dot_product_attention(q, k, v, given, /*dropout_p=*/0, hides && !given, scale,
                                          /*enable_gqa=*/grouped);
}

}  // namespace

torch::Tensor attention(const torch::Tensor& query, const torch::Tensor& key,
                        const torch::Tensor& value, const AttentionOptions& options) {
  const torch::Tensor q = autocast(query), k = autocast(key), v = autocast(value);
  check_like("k", k, q);
  check_like("v", v, q);
  const double usual = q.dim() > 0 ? 1 / std::sqrt(static_cast<double>(q.size(-1))) : 0;
  AttentionShape shape = attention_shape(q.sizes(), k.sizes(), v.sizes(), options.causal,
                                         options.scale.value_or(usual));
  const bool recorded = torch::GradMode::is_enabled() &&
                        (q.requires_grad() || k.requires_grad() || v.requires_grad());
  bool taken = refusal_of(q, shape, recorded).empty() && q.device().is_cpu();
  torch::Tensor mask = options.mask;
  OptionalTensor runs;
  if (mask.defined()) {
    if (shape.causal) mask = causal_part(mask, shape);
    shape.causal = false;
    if (taken) runs = runs_of(mask, shape);
    taken = runs.has_value();
  }
  if (!taken) return torch_attention(q, k, v, shape, mask, options.scale);
  if (recorded) return AttentionFunction::apply(q, k, v, runs, shape);
  const at::AutoDispatchBelowAutograd below;
  return std::get<0>(call_forward(q, k, v, runs, shape, false));
}

}  // namespace quantal

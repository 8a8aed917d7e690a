// Attention for C++ programs: autograd, autocast and the choice between the kernels and torch's.
#include "quantal/torch/attention.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "quantal/torch/ops.h"
#include "torch/ops_link.h"

namespace quantal {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                    bool, double, bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                             const Tensor&, const Tensor&,
                                                             const Tensor&, const Tensor&, bool,
                                                             double);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  link_torch_ops();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> call_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const AttentionShape& shape, bool with_gradient) {
  static const auto op = find_op<ForwardSignature>("quantal::attention");
  return op.call(q, k, v, shape.causal, shape.scale, with_gradient);
}

/// The gradients of q, k and v, which have none themselves.
struct AttentionGradFunction : public torch::autograd::Function<AttentionGradFunction> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& out,
                               const Tensor& lse, bool causal, double scale) {
    static const auto op = find_op<BackwardSignature>("quantal::attention_backward");
    const auto [dq, dk, dv] = op.call(grad, q, k, v, out, lse, causal, scale);
    return {dq, dk, dv};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    fail(Errc::kUnsupported,
         "attention: is differentiated twice, expected once (torch's attention, with a mask or "
         "torch::scaled_dot_product_attention, can be)");
  }
};

struct AttentionFunction : public torch::autograd::Function<AttentionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionShape& shape) {
    const auto [out, lse] = call_forward(q, k, v, shape, true);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["causal"] = shape.causal;
    ctx->saved_data["scale"] = static_cast<double>(shape.scale);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    variable_list found = AttentionGradFunction::apply(grads[0], s[0], s[1], s[2], s[3], s[4],
                                                       ctx->saved_data["causal"].toBool(),
                                                       ctx->saved_data["scale"].toDouble());
    found.emplace_back();  // of the shape
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

bool kernels_take(const Tensor& q, const AttentionShape& shape, bool with_gradient) {
  const auto type = q.scalar_type();
  const bool known = type == torch::kFloat || type == torch::kHalf || type == torch::kBFloat16;
  return known && q.device().is_cpu() &&
         attention_refusal(shape, from_torch(type), with_gradient).empty();
}

/// [queries, keys]: true where a causal attention looks.
Tensor causal_mask(const AttentionShape& s, const Tensor& like) {
  const auto options = torch::TensorOptions().dtype(torch::kBool).device(like.device());
  return torch::ones({s.queries, s.keys}, options).tril_(s.keys - s.queries);
}

/// `mask` of torch's attention for what `options` say; nothing where it needs none.
std::optional<Tensor> torch_mask(const Tensor& q, const AttentionShape& s, const Tensor& mask) {
  const bool hides = s.causal && s.queries > 1;
  if (!mask.defined()) {
    return hides && s.keys > s.queries ? std::optional(causal_mask(s, q)) : std::nullopt;
  }
  if (!hides) return mask;
  const Tensor seen = causal_mask(s, q);
  if (mask.scalar_type() == torch::kBool) return mask.logical_and(seen);
  return mask.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity());
}

Tensor torch_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionShape& s,
                       const Tensor& mask) {
  const bool grouped = s.heads > s.kv_heads;
  if (grouped && s.queries == 1 && !mask.defined()) {
    // One position sees all keys: heads that share them are rows of one query, without copies.
    const Tensor rows = q.reshape({s.batch, s.kv_heads, s.heads / s.kv_heads, s.dim});
    return at::scaled_dot_product_attention(rows, k, v, {}, 0, false, s.scale).reshape(q.sizes());
  }
  const auto given = torch_mask(q, s, mask);
  const bool causal = s.causal && s.queries > 1 && !given;
  return at::scaled_dot_product_attention(q, k, v, given, /*dropout_p=*/0, causal, s.scale,
                                          /*enable_gqa=*/grouped);
}

}  // namespace

torch::Tensor attention(const torch::Tensor& query, const torch::Tensor& key,
                        const torch::Tensor& value, const AttentionOptions& options) {
  const torch::Tensor q = autocast(query), k = autocast(key), v = autocast(value);
  check_like("k", k, q);
  check_like("v", v, q);
  const double usual = q.dim() > 0 ? 1 / std::sqrt(static_cast<double>(q.size(-1))) : 0;
  const AttentionShape shape = attention_shape(q.sizes(), k.sizes(), v.sizes(), options.causal,
                                               options.scale.value_or(usual));
  const bool recorded = torch::GradMode::is_enabled() &&
                        (q.requires_grad() || k.requires_grad() || v.requires_grad());
  if (options.mask.defined() || !kernels_take(q, shape, recorded)) {
    return torch_attention(q, k, v, shape, options.mask);
  }
  if (recorded) return AttentionFunction::apply(q, k, v, shape);
  const at::AutoDispatchBelowAutograd below;
  return std::get<0>(call_forward(q, k, v, shape, false));
}

}  // namespace quantal

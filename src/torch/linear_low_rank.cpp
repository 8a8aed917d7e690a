#include "torch/linear_low_rank.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/torch.h>

#include <optional>
#include <tuple>

#include "torch/dispatch_op.h"
#include "torch/packed_product.h"

namespace quantal {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using AddSignature = Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
using BackwardSignature = std::tuple<Tensor, Tensor>(const OptionalTensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, double);

/// What autograd's context keeps besides tensors.
struct Setting {
  PackedSpec spec;
  torch::ScalarType compute_dtype;
  double scaling;
};
struct SettingHolder : public torch::CustomClassHolder {
  explicit SettingHolder(const Setting& s) : setting(s) {}
  Setting setting;
};

/// The result and `scaling seen A^T`, which the gradient needs.
std::pair<Tensor, Tensor> values_of(const Tensor& x, const Tensor& seen, const PackedTensors& w,
                                    const Tensor& bias, const Tensor& a, const Tensor& b,
                                    const Setting& setting) {
  static const auto add = find_op<AddSignature>("quantal::add_low_rank_");
  const torch::NoGradGuard no_grad;
  const at::AutoDispatchBelowAutograd below;
  Tensor y = linear(x.to(setting.compute_dtype), w, bias).to(x.scalar_type());
  Tensor t = add.call(y, seen, a, b, setting.scaling);
  return {y, t};
}

Tensor base_gradient(const Tensor& grad, const PackedTensors& w, const Setting& setting) {
  return linear_grad_input(grad.to(setting.compute_dtype), w).to(grad.scalar_type());
}

struct LowRankFunction : public torch::autograd::Function<LowRankFunction> {
  // Arguments of forward, for each of which backward returns a gradient.
  enum : std::size_t { kX = 0, kA, kB, kDropped, kBias, kArguments = 7 };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b,
                        const OptionalTensor& dropped, const OptionalTensor& bias,
                        const PackedTensors& w, const c10::intrusive_ptr<SettingHolder>& holder) {
    const Tensor& seen = dropped ? *dropped : x;
    const auto [y, t] = values_of(x, seen, w, bias.value_or(Tensor()), a, b, holder->setting);
    ctx->save_for_backward({seen, t, a, b, w.codes, w.stats, w.shared});
    ctx->saved_data["setting"] = c10::IValue::make_capsule(holder);
    ctx->saved_data["drops"] = dropped.has_value();
    if (bias) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool drops = ctx->saved_data["drops"].toBool();
    variable_list out(kArguments);
    const auto bias_dtype = ctx->saved_data.find("bias_dtype");
    // needs_input_grad counts the tensors that were given.
    if (bias_dtype != ctx->saved_data.end() && ctx->needs_input_grad(drops ? kBias : kBias - 1)) {
      const Tensor rows = grads[0].reshape({-1, grads[0].size(-1)});
      out[kBias] = rows.sum(0).to(bias_dtype->second.toScalarType());
    }
    if (torch::GradMode::is_enabled()) {
      differentiable_gradients(ctx, grads[0], drops, out);
    } else {
      gradients(ctx, grads[0].contiguous(), drops, out);
    }
    return out;
  }

 private:
  static const Setting& setting_of(AutogradContext* ctx) {
    const auto capsule = ctx->saved_data["setting"].toCapsule();
    return static_cast<const SettingHolder&>(*capsule).setting;  // ctx holds it
  }

  static void gradients(AutogradContext* ctx, const Tensor& grad, bool drops, variable_list& out) {
    static const auto low_rank = find_op<BackwardSignature>("quantal::low_rank_backward_");
    const variable_list s = ctx->get_saved_variables();
    const Setting& setting = setting_of(ctx);
    if (ctx->needs_input_grad(kX)) {
      out[kX] = base_gradient(grad, {setting.spec, s[4], s[5], s[6]}, setting);
    }
    if (drops && ctx->needs_input_grad(kDropped)) {
      out[kDropped] = torch::zeros(s[0].sizes(), s[0].options());
    }
    const Tensor& into = drops ? out[kDropped] : out[kX];
    const at::AutoDispatchBelowAutograd below;
    std::tie(out[kA], out[kB]) = low_rank.call(into.defined() ? OptionalTensor(into) : std::nullopt,
                                               grad, s[0], s[1], s[2], s[3], setting.scaling);
  }

  /// The same in operators that are differentiable themselves.
  static void differentiable_gradients(AutogradContext* ctx, const Tensor& grad, bool drops,
                                       variable_list& out) {
    const variable_list s = ctx->get_saved_variables();
    const Setting& setting = setting_of(ctx);
    const Tensor& seen = s[0];
    const Tensor a = s[2].to(torch::kFloat), b = s[3].to(torch::kFloat);
    const Tensor g = grad.reshape({-1, grad.size(-1)}).to(torch::kFloat);
    const Tensor rows = seen.reshape({-1, seen.size(-1)}).to(torch::kFloat);
    const Tensor d = torch::matmul(g, b) * setting.scaling;
    const Tensor t = torch::matmul(rows, a.t()) * setting.scaling;
    const Tensor low = torch::matmul(d, a).to(seen.scalar_type()).reshape(seen.sizes());
    const Tensor of_x = base_gradient(grad, {setting.spec, s[4], s[5], s[6]}, setting);
    out[kX] = drops ? of_x : of_x + low;
    if (drops) out[kDropped] = low;
    out[kA] = torch::matmul(d.t(), rows).to(s[2].scalar_type());
    out[kB] = torch::matmul(g.t(), t).to(s[3].scalar_type());
  }
};

bool needs_gradient(const Tensor& t) { return t.defined() && t.requires_grad(); }

}  // namespace

torch::Tensor linear_low_rank(const torch::Tensor& x, const torch::Tensor& seen,
                              const PackedTensors& w, const torch::Tensor& bias,
                              torch::ScalarType compute_dtype, const LowRankTensors& adapter) {
  const Setting setting{w.spec, compute_dtype, adapter.scaling};
  const auto& [a, b, scaling] = adapter;
  const bool recorded = torch::GradMode::is_enabled() &&
                        (needs_gradient(x) || needs_gradient(seen) || needs_gradient(a) ||
                         needs_gradient(b) || needs_gradient(bias));
  if (!recorded) return values_of(x, seen, w, bias, a, b, setting).first;
  return LowRankFunction::apply(x, a, b, seen.is_same(x) ? std::nullopt : OptionalTensor(seen),
                                bias.defined() ? OptionalTensor(bias) : std::nullopt, w,
                                c10::make_intrusive<SettingHolder>(setting));
}

}  // namespace quantal

#include "torch/recompute.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/torch.h>

#include <mutex>
#include <utility>

namespace quantal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Body = std::function<torch::Tensor(const torch::Tensor&)>;

/// Carries the body through an autograd context, which stores IValues only.
struct BodyHolder : public torch::CustomClassHolder {
  explicit BodyHolder(Body f) : body(std::move(f)) {}
  Body body;
};

torch::Tensor generator_state() {
  auto generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

/// Sets the CPU generator for a scope and restores what was there.
class GeneratorScope {
 public:
  explicit GeneratorScope(const torch::Tensor& state) : previous_(generator_state()) { set(state); }
  ~GeneratorScope() { set(previous_); }
  GeneratorScope(const GeneratorScope&) = delete;
  GeneratorScope& operator=(const GeneratorScope&) = delete;

 private:
  static void set(const torch::Tensor& state) {
    auto generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard lock(generator.mutex());
    generator.set_state(state);
  }
  torch::Tensor previous_;
};

struct RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& x,
                               const c10::intrusive_ptr<BodyHolder>& holder) {
    ctx->save_for_backward({x});
    ctx->saved_data["state"] = generator_state();
    ctx->saved_data["body"] = c10::IValue::make_capsule(holder);
    return holder->body(x);  // gradients are off here
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto capsule = ctx->saved_data["body"].toCapsule();
    const auto& body = static_cast<const BodyHolder&>(*capsule).body;
    torch::Tensor x = ctx->get_saved_variables()[0].detach();
    x.set_requires_grad(true);
    torch::Tensor y;
    {
      const GeneratorScope scope(ctx->saved_data["state"].toTensor());
      const torch::AutoGradMode grad_on(true);
      y = body(x);
    }
    torch::autograd::backward({y}, {grads[0]});
    return {x.grad(), {}};
  }
};

}  // namespace

torch::Tensor recompute_in_backward(const Body& body, const torch::Tensor& x) {
  return RecomputeFunction::apply(x, c10::make_intrusive<BodyHolder>(body));
}

}  // namespace quantal

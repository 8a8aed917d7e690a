#include "quantal/torch/training.h"

#include <torch/torch.h>

#include <algorithm>
#include <cctype>
#include <set>
#include <string>

#include "quantal/torch/linear.h"
#include "quantal/torch/llama.h"
#include "torch/state.h"

namespace quantal {
namespace {

bool is_norm(const torch::nn::Module& module) {
  std::string name = module.name();
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name.find("norm") != std::string::npos;
}

void widen_norms(torch::nn::Module& model) {
  for (const auto& module : model.modules()) {
    if (!is_norm(*module)) continue;
    for (auto& parameter : module->parameters(/*recurse=*/false)) {
      const torch::ScalarType type = parameter.scalar_type();
      if (type == torch::kHalf || type == torch::kBFloat16) {
        parameter.set_data(parameter.to(torch::kFloat));
      }
    }
  }
}

}  // namespace

void freeze_base(torch::nn::Module& model) {
  std::set<const void*> adapters;
  for (const auto& [name, layer] : named_linears(model)) {
    for (const auto& [adapter_name, adapter] : layer->loras()) {
      for (const auto& p : adapter->parameters()) adapters.insert(p.unsafeGetTensorImpl());
    }
  }
  for (auto& parameter : model.parameters()) {
    if (!adapters.contains(parameter.unsafeGetTensorImpl())) parameter.set_requires_grad(false);
  }
}

void prepare_model_for_training(torch::nn::Module& model, const TrainingOptions& options) {
  freeze_base(model);
  if (options.norms_in_float32) widen_norms(model);
  auto* llama = dynamic_cast<LlamaImpl*>(&model);
  if (llama != nullptr && options.use_gradient_checkpointing) {
    llama->set_gradient_checkpointing(true);
  }
  model.train();
}

}  // namespace quantal

#include "torch/state.h"

#include <set>

#include "quantal/torch/linear.h"

namespace quantal {

std::vector<std::pair<std::string, torch::Tensor>> base_tensors(torch::nn::Module& model) {
  std::vector<std::pair<std::string, torch::Tensor>> out;
  std::set<const void*> seen;
  const auto add = [&](const std::string& name, const torch::Tensor& t) {
    if (t.defined() && seen.insert(t.unsafeGetTensorImpl()).second) out.emplace_back(name, t);
  };
  for (const auto& item : model.named_modules()) {
    const auto& module = item.value();
    const std::string prefix = item.key().empty() ? "" : item.key() + ".";
    if (std::dynamic_pointer_cast<LoraImpl>(module)) continue;
    if (const auto packed = std::dynamic_pointer_cast<QuantizedLinearImpl>(module)) {
      // "a.b.packed" is layer "a.b"
      const std::string own = "packed.";
      const bool child = prefix.ends_with(own);
      add((child ? prefix.substr(0, prefix.size() - own.size()) : prefix) + "bias", packed->bias);
      continue;
    }
    for (const auto& p : module->named_parameters(/*recurse=*/false))
      add(prefix + p.key(), p.value());
    for (const auto& b : module->named_buffers(/*recurse=*/false)) add(prefix + b.key(), b.value());
  }
  return out;
}

}  // namespace quantal

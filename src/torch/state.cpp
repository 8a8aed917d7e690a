#include "torch/state.h"

#include <set>

#include "quantal/torch/linear.h"

namespace quantal {
namespace {

/// "a.b.packed." is layer "a.b.": the form of a Linear is a child of it.
std::string without_child(const std::string& prefix, const std::string& child) {
  return prefix.ends_with(child) ? prefix.substr(0, prefix.size() - child.size()) : prefix;
}

}  // namespace

std::vector<std::pair<std::string, torch::Tensor>> base_tensors(torch::nn::Module& model) {
  std::vector<std::pair<std::string, torch::Tensor>> out;
  std::set<const void*> seen;
  const auto add = [&](const std::string& name, const torch::Tensor& t) {
    if (t.defined() && seen.insert(t.unsafeGetTensorImpl()).second) out.emplace_back(name, t);
  };
  std::vector<std::string> forms;  // prefixes of layers of another form
  for (const auto& item : model.named_modules()) {
    const auto& module = item.value();
    std::string prefix = item.key().empty() ? "" : item.key() + ".";
    if (std::dynamic_pointer_cast<LoraImpl>(module)) continue;
    if (const auto packed = std::dynamic_pointer_cast<QuantizedLinearImpl>(module)) {
      add(without_child(prefix, "packed.") + "bias", packed->bias);
      continue;
    }
    if (std::dynamic_pointer_cast<QuantizedLayerImpl>(module)) forms.push_back(prefix);
    for (const std::string& form : forms) {
      if (!prefix.starts_with(form)) continue;
      prefix = without_child(form, "custom.") + prefix.substr(form.size());
      break;
    }
    for (const auto& p : module->named_parameters(/*recurse=*/false))
      add(prefix + p.key(), p.value());
    for (const auto& b : module->named_buffers(/*recurse=*/false)) add(prefix + b.key(), b.value());
  }
  return out;
}

}  // namespace quantal

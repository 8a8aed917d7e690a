#include <torch/torch.h>

#include <map>
#include <memory>

#include "quantal/torch/embedding.h"
#include "quantal/torch/linear.h"
#include "quantal/torch/ops.h"
#include "quantal/torch/plan.h"

namespace quantal {
namespace {

using Kind = OutlineTensor::Kind;

constexpr std::string_view kPacked = "packed";

std::string joined(const std::string& module, const std::string& name) {
  return module.empty() ? name : module + "." + name;
}

/// The module of which `module` is the child of this name: "a.q_proj" of "a.q_proj.packed".
std::string parent_of(const std::string& module, std::string_view child) {
  if (module == child) return {};
  return module.ends_with("." + std::string(child))
             ? module.substr(0, module.size() - child.size() - 1)
             : module;
}

class Outline {
 public:
  explicit Outline(ModelOutline& out) : out_(out) {}

  void add(const std::string& name, torch::nn::Module& module) {
    if (const auto* packed = dynamic_cast<QuantizedLinearImpl*>(&module)) {
      add_packed(parent_of(name, kPacked), *packed);
    } else if (const auto* lora = dynamic_cast<LoraImpl*>(&module)) {
      const std::size_t dot = name.rfind('.');  // "a.q_proj.lora_default"
      const std::string layer = dot == std::string::npos ? "" : name.substr(0, dot);
      add_adapter(joined(layer, "lora_A.weight"), lora->A);
      add_adapter(joined(layer, "lora_B.weight"), lora->B);
      if (lora->is_dora()) add_adapter(joined(layer, "lora_magnitude_vector"), lora->magnitude);
    } else {
      const bool linear = dynamic_cast<LinearImpl*>(&module) != nullptr;
      for (const auto& item : module.named_parameters(/*recurse=*/false)) {
        const bool weight = linear && item.key() == "weight";
        add_tensor(joined(name, item.key()), item.value(), weight ? Kind::kLinear : Kind::kDense);
      }
      for (const auto& item : module.named_buffers(/*recurse=*/false)) {
        add_tensor(joined(name, item.key()), item.value(), Kind::kBuffer);
      }
    }
  }

 private:
  /// Name of the tensor that has this memory already, else empty.
  std::string seen(const torch::Tensor& tensor, const std::string& name) {
    const void* storage = tensor.storage().unsafeGetStorageImpl();
    const auto [found, fresh] = owners_.try_emplace(storage, name);
    return fresh ? std::string() : found->second;
  }

  void add_tensor(const std::string& name, const torch::Tensor& tensor, Kind kind) {
    if (!tensor.defined()) return;
    const std::string first = seen(tensor, name);
    if (!first.empty() && kind != Kind::kLinear) return;
    OutlineTensor one;
    one.name = name;
    one.kind = kind;
    one.shape = tensor.sizes().vec();
    one.dtype = from_torch(tensor.scalar_type());
    one.tied_to = first;
    out_.tensors.push_back(std::move(one));
  }

  void add_adapter(const std::string& name, const torch::Tensor& tensor) {
    add_tensor(name, tensor, Kind::kDense);
    if (out_.tensors.back().name == name) out_.tensors.back().trainable = true;
  }

  void add_packed(const std::string& name, const QuantizedLinearImpl& layer) {
    const PackedSpec& spec = layer.spec();
    OutlineTensor one;
    one.name = name;
    one.kind = Kind::kPacked;
    one.spec = spec;
    one.shape = {spec.rows, spec.cols};
    one.dtype = spec.value_dtype;
    one.stored_bytes = layout_of(spec).total_bytes(spec) + kSpecBytes;
    one.tied_to = seen(layer.codes, name);
    out_.tensors.push_back(std::move(one));
    if (layer.bias.defined()) add_tensor(joined(name, "bias"), layer.bias, Kind::kDense);
  }

  ModelOutline& out_;
  std::map<const void*, std::string> owners_;
};

}  // namespace

ModelOutline outline_of(torch::nn::Module& model, const std::string& config_json) {
  ModelOutline out;
  out.source = model.name() + " (in memory)";
  out.config_json = config_json;
  out.in_memory = true;
  Outline outline(out);
  for (const auto& item : model.named_modules()) outline.add(item.key(), *item.value());
  return out;
}

Plan plan(torch::nn::Module& model, const PlanOptions& options, const std::string& config_json) {
  return plan(outline_of(model, config_json), options);
}

}  // namespace quantal

// Saving and loading quantized torch models through the checkpoint room.
#include "quantal/checkpoint.h"

#include <torch/torch.h>

#include <map>
#include <set>
#include <string>
#include <utility>

#include "quantal/torch/adapter.h"
#include "torch/state.h"

namespace quantal {
namespace {

/// The options that describe the whole model in config.json: those of the config where no pattern
/// speaks, with the value dtype of the layers that are there.
QuantizeOptions model_options(const QuantizationConfig& config, torch::nn::Module& model) {
  QuantizationConfig plain = config;
  plain.skip_modules.clear();
  plain.layer_configs.clear();
  QuantizeOptions options;
  options.method = config.method;
  for (const auto& [name, layer] : named_linears(model)) {
    if (!layer->is_quantized()) continue;
    const auto choice = LayerRules(plain).choose(name, layer->out_features, layer->in_features);
    options = choice.options;
    options.value_dtype = layer->packed->spec().value_dtype;
    break;
  }
  return options;
}

void copy_into(const TensorView& from, torch::Tensor& to) {
  const torch::NoGradGuard no_grad;
  auto* data = const_cast<std::uint8_t*>(from.bytes.data());  // from_blob reads only
  const auto source =
      torch::from_blob(data, from.shape, torch::TensorOptions().dtype(to_torch(from.dtype)));
  if (to.scalar_type() == source.scalar_type()) {
    to.copy_(source);
  } else {  // the file decides the dtype, as in load_state_dict(assign=True)
    to.set_data(source.clone());
  }
}

/// What a strict load found wrong, one line each.
class Complaints {
 public:
  void add(const std::string& kind, const std::string& what) { lines_[kind].insert(what); }
  void raise(const std::string& path) const {
    if (lines_.empty()) return;
    std::string text;
    for (const auto& [kind, names] : lines_) {
      text += (text.empty() ? "" : "; ") + kind + " " + std::to_string(names.size()) + ":";
      std::size_t shown = 0;
      for (const auto& name : names) {
        if (++shown > 8) break;
        text += " " + name;
      }
      if (names.size() > 8) text += " ...";
    }
    fail(Errc::kCorrupt, "load_quantized_model: tensors do not fit the model: " + text,
         {path, "", -1});
  }

 private:
  std::map<std::string, std::set<std::string>> lines_;
};

/// Compares names and shapes of a file and a model before anything changes.
void check_fit(const Checkpoint& file, torch::nn::Module& model, const std::string& path) {
  Complaints complaints;
  std::map<std::string, std::vector<std::int64_t>> expected;  // dense tensors, as they will be
  for (const auto& [name, tensor] : base_tensors(model)) expected[name] = tensor.sizes().vec();
  std::set<std::string> packed;
  for (const auto& [name, layer] : named_linears(model)) {
    const auto found = file.layers.find(name);
    if (found == file.layers.end()) {
      expected[name + ".weight"] = {layer->out_features, layer->in_features};
      continue;
    }
    packed.insert(name);
    expected.erase(name + ".weight");
    const PackedSpec& spec = found->second.spec;
    if (spec.rows != layer->out_features || spec.cols != layer->in_features) {
      complaints.add("misshapen", name);
    }
  }
  for (const auto& [name, matrix] : file.layers) {
    if (!packed.contains(name)) complaints.add("extra", name);
  }
  for (const auto& [name, shape] : expected) {
    const auto found = file.tensors.find(name);
    if (found == file.tensors.end()) {
      complaints.add("missing", name);
    } else if (found->second.shape != shape) {
      complaints.add("misshapen", name);
    }
  }
  for (const auto& [name, view] : file.tensors) {
    if (!expected.contains(name)) complaints.add("extra", name);
  }
  complaints.raise(path);
}

}  // namespace

void QuantizationAdapter::save_quantized_model(torch::nn::Module& model, const std::string& path,
                                               const std::string& config_json, bool overwrite) {
  const torch::NoGradGuard no_grad;
  CheckpointView view;
  view.config_json = config_json;
  for (const auto& [name, layer] : named_linears(model)) {
    if (!layer->is_quantized()) continue;
    view.layers.emplace_back(name, layer->packed->packed().view());
  }
  std::vector<torch::Tensor> contiguous;
  for (auto& [name, tensor] : base_tensors(model)) {
    contiguous.push_back(tensor.detach().contiguous());
    view.tensors.emplace_back(name, tensor_view(contiguous.back()));
  }
  if (!view.layers.empty()) {
    const QuantizeOptions options = model_options(config_, model);
    view.quantization_config_json =
        dialect_of(options.method).hf_quantization_config(options, config_.skip_modules);
  }
  save_checkpoint(path, view, overwrite);
}

void QuantizationAdapter::load_quantized_model(const std::string& path, torch::nn::Module& model) {
  const Checkpoint file = load_checkpoint(path);
  check_fit(file, model, path);
  for (const auto& [name, layer] : named_linears(model)) {
    const auto found = file.layers.find(name);
    if (found != file.layers.end()) {
      const PackedMatrix& matrix = found->second;
      const auto compute = config_.compute_dtype.value_or(matrix.spec.value_dtype);
      layer->set_quantized(
          QuantizedLinear(to_tensors(matrix.view()), layer->current_bias(), to_torch(compute)));
    } else if (layer->is_quantized()) {
      const TensorView& view = file.tensors.at(name + ".weight");
      layer->set_dense(torch::empty(view.shape, torch::TensorOptions().dtype(to_torch(view.dtype))),
                       layer->current_bias());
    }
  }
  for (auto& [name, tensor] : base_tensors(model)) copy_into(file.tensors.at(name), tensor);
}

}  // namespace quantal

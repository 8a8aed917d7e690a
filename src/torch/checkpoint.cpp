// Saving and loading quantized torch models through the checkpoint room.
#include "quantal/checkpoint.h"

#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "quantal/torch/adapter.h"
#include "quantal/torch/embedding.h"
#include "quantal/torch/llama.h"
#include "torch/custom.h"
#include "torch/stable_executor.h"
#include "torch/state.h"

namespace quantal {
namespace {

using Shapes = std::map<std::string, std::vector<std::int64_t>>;

std::string weight_of(const std::string& module) {
  return module.empty() ? "weight" : module + ".weight";
}

void copy_into(const TensorView& from, torch::Tensor& to) {
  auto* data = const_cast<std::uint8_t*>(from.bytes.data());  // from_blob reads only
  const auto source =
      torch::from_blob(data, from.shape, torch::TensorOptions().dtype(to_torch(from.dtype)));
  if (to.scalar_type() == source.scalar_type()) {
    to.copy_(source);
  } else {  // the file decides the dtype, as in load_state_dict(assign=True)
    to.set_data(source.clone());
  }
}

/// Parameters and buffers of a layer of one's own, by the names that files use.
Shapes tensors_of(const QuantizedLayerImpl& layer, const std::string& name) {
  Shapes out;
  const std::string prefix = name.empty() ? "" : name + ".";
  for (const auto& p : layer.named_parameters()) out[prefix + p.key()] = p.value().sizes().vec();
  for (const auto& b : layer.named_buffers()) out[prefix + b.key()] = b.value().sizes().vec();
  return out;
}

/// What a file has to fill, once layers of the forms in `custom` are in their places.
ModelParts parts_of(torch::nn::Module& model, const Checkpoint& file, const CustomLayers& custom) {
  ModelParts parts;
  for (const auto& [name, tensor] : base_tensors(model)) parts.tensors[name] = tensor.sizes().vec();
  for (const auto& [name, layer] : named_linears(model)) {
    const std::string weight = weight_of(name);
    const auto made = custom.find(name);
    if (made) {
      parts.tensors.erase(weight);
      parts.tensors.merge(tensors_of(*made, name));
      continue;
    }
    if (layer->custom) {  // stays, unless the file has the layer in another form
      if (!file.tensors.contains(weight) && !file.layers.contains(name)) continue;
      for (const auto& [own, shape] : tensors_of(*layer->custom, name)) parts.tensors.erase(own);
      if (layer->custom->bias.defined()) {
        parts.tensors[name.empty() ? "bias" : name + ".bias"] = {layer->out_features};
      }
    }
    parts.linears.insert(name);
    parts.tensors[weight] = {layer->out_features, layer->in_features};
  }
  for (const auto& [name, table] : named_embeddings(model)) {
    parts.embeddings.insert(name);
    parts.tensors[weight_of(name)] = {table->num_embeddings, table->embedding_dim};
  }
  const auto* llama = dynamic_cast<const LlamaImpl*>(&model);
  if (llama == nullptr) return parts;
  for (const auto& [alias, name] : llama->tied_tensors()) {
    // A head that is packed by itself is not the embedding.
    const std::string module = alias.substr(0, alias.rfind('.'));
    if (file.layers.contains(module)) continue;
    parts.tensors[alias] = parts.tensors.at(name);
    parts.tied[alias] = name;
  }
  return parts;
}

LoadOptions options_for(torch::nn::Module& model) {
  Shapes shapes;
  for (const auto& [name, layer] : named_linears(model)) {
    shapes[name] = {layer->out_features, layer->in_features};
  }
  for (const auto& [name, table] : named_embeddings(model)) {
    shapes[name] = {table->num_embeddings, table->embedding_dim};
  }
  LoadOptions options;
  options.executor = &stable_executor();
  options.weight_shape = [shapes](const std::string& module) {
    const auto found = shapes.find(module);
    return found == shapes.end() ? std::vector<std::int64_t>{} : found->second;
  };
  return options;
}

/// Puts the content of one file into one model.
class Filler {
 public:
  Filler(Checkpoint& file, const LoadReport& report, const ModelParts& parts,
         const CustomLayers& custom, const QuantizationConfig& config)
      : file_(file),
        custom_(custom),
        compute_dtype_(config.compute_dtype),
        config_(config),
        int8_threshold_(int8_threshold(config)),
        parts_(parts) {
    wrong_.insert(report.unexpected.begin(), report.unexpected.end());
    for (const auto& one : report.misshapen) wrong_.insert(one.name);
    decoded_.insert(report.decoded.begin(), report.decoded.end());
  }

  /// Why layers multiply exactly although int8 activations were asked for, each reason once.
  const std::set<std::string>& notes() const { return notes_; }

  void fill(torch::nn::Module& model) {
    for (const auto& [name, layer] : named_linears(model)) {
      if (has_layer(name)) {
        layer->set_quantized(take(name, layer->current_bias()));
      } else if (const auto made = custom_.find(name)) {
        layer->set_custom(made);
      } else if (const TensorView* view = layer->is_quantized() ? find(weight_of(name)) : nullptr) {
        layer->set_dense(empty_like(*view), layer->current_bias());
      }
    }
    for (const auto& [name, table] : named_embeddings(model)) {
      if (has_layer(name)) {
        table->set_quantized(take(name, {}));
      } else if (const TensorView* view = table->is_quantized() ? find(weight_of(name)) : nullptr) {
        table->set_dense(empty_like(*view));
      }
    }
    for (auto& [name, tensor] : base_tensors(model)) fill_tensor(name, tensor);
  }

 private:
  bool has_layer(const std::string& name) const {
    return file_.layers.contains(name) && !wrong_.contains(name);
  }

  static torch::Tensor empty_like(const TensorView& view) {
    return torch::empty(view.shape, torch::TensorOptions().dtype(to_torch(view.dtype)));
  }

  /// A layer of the file, whose bytes move.
  QuantizedLinear take(const std::string& name, torch::Tensor bias) {
    PackedMatrix matrix = std::move(file_.layers.at(name));
    const auto compute = to_torch(compute_dtype_.value_or(matrix.spec.value_dtype));
    const bool int8 = matrix.spec.bits == 8 && dialect_by_id(matrix.spec.dialect).name == "bnb";
    const ActivationChoice choice = choose_activations(config_, matrix.spec);
    QuantizedLinear layer(to_tensors(std::move(matrix)), std::move(bias), compute);
    layer->activations = choice.activations;
    if (!choice.reason.empty()) notes_.insert(choice.reason);
    if (int8) layer->int8_threshold = int8_threshold_;
    return layer;
  }

  /// Dense content of a tensor, under its own name or that of an alias; null if there is none.
  const TensorView* find(const std::string& name) const {
    const auto own = file_.tensors.find(name);
    if (own != file_.tensors.end() && !wrong_.contains(name)) return &own->second;
    for (const auto& [alias, root] : parts_.tied) {
      const auto other = file_.tensors.find(alias);
      if (root == name && other != file_.tensors.end() && !wrong_.contains(alias)) {
        return &other->second;
      }
    }
    return nullptr;
  }

  void fill_tensor(const std::string& name, torch::Tensor& tensor) {
    const std::size_t dot = name.rfind('.');
    const std::string module = dot == std::string::npos ? "" : name.substr(0, dot);
    if (name == weight_of(module) && decoded_.contains(module)) {
      const PackedMatrix& matrix = file_.layers.at(module);
      tensor.set_data(dequantize(to_tensors(matrix.view()), to_torch(matrix.spec.value_dtype)));
    } else if (const TensorView* view = find(name)) {
      copy_into(*view, tensor);
    }
  }

  Checkpoint& file_;
  const CustomLayers& custom_;
  std::optional<DType> compute_dtype_;
  const QuantizationConfig& config_;
  std::optional<double> int8_threshold_;
  const ModelParts& parts_;
  std::set<std::string> wrong_, decoded_, notes_;
};

}  // namespace

void QuantizationAdapter::save_quantized_model(torch::nn::Module& model, const std::string& path,
                                               const std::string& config_json,
                                               const SaveOptions& options, const SideTexts& texts) {
  const torch::NoGradGuard no_grad;
  CheckpointView view;
  view.config_json = with_adapter_entry(config_json, *this);
  view.texts = texts;
  std::vector<PackedTensors> packed;  // copies where the model is on another device
  const auto add = [&](const std::string& name, const QuantizedLinearImpl& layer) {
    packed.push_back(layer.packed().cpu());
    view.layers.emplace_back(name, packed.back().view());
  };
  for (const auto& [name, table] : named_embeddings(model)) {
    if (table->is_quantized()) add(name, *table->packed);
  }
  for (const auto& [name, layer] : named_linears(model)) {
    if (layer->packed) {
      add(name, *layer->packed);
    } else if (!layer->custom) {
      view.dense.push_back(name);
    }
  }
  std::vector<torch::Tensor> contiguous;
  for (auto& [name, tensor] : base_tensors(model)) {
    contiguous.push_back(tensor.detach().cpu().contiguous());
    view.tensors.emplace_back(name, tensor_view(contiguous.back()));
  }
  save_checkpoint(path, view, options);
}

LoadedModel QuantizationAdapter::load_quantized_model(const std::string& path,
                                                      torch::nn::Module& model,
                                                      const LoadModelOptions& options) {
  const torch::NoGradGuard no_grad;
  Checkpoint file = load_checkpoint(path, options_for(model));
  const CustomLayers custom(file, model, *this, path);
  const ModelParts parts = parts_of(model, file, custom);
  LoadedModel loaded{.report = compare_model(parts_of(file), parts, &config_),
                     .config_json = file.config_json,
                     .texts = file.texts};
  loaded.report.layout = file.layout;
  loaded.report.notes = file.notes;
  if (options.strict) require_fit(loaded.report, path);
  Filler filler(file, loaded.report, parts, custom, config_);
  filler.fill(model);
  loaded.report.notes.insert(loaded.report.notes.end(), filler.notes().begin(),
                             filler.notes().end());
  note_load(loaded.report);
  return loaded;
}

void QuantizationAdapter::note_load(const LoadReport& load) {
  const auto of_a_file = [&](const Substitution& s) {
    return std::any_of(file_settings_.begin(), file_settings_.end(),
                       [&](const Substitution& f) { return f.what == s.what && f.used == s.used; });
  };
  std::erase_if(report_.substitutions, of_a_file);
  std::erase(warnings_, file_warning_);
  file_settings_ = load.settings;
  file_warning_ = load.settings_text();
  report_.substitutions.insert(report_.substitutions.end(), load.settings.begin(),
                               load.settings.end());
  if (!file_warning_.empty()) warnings_.push_back(file_warning_);
}

Llama load_quantized_llama(const std::string& path, QuantizationAdapter& adapter,
                           LoadedModel* loaded) {
  const std::string config = CheckpointReader::open(path)->config_json();
  Llama llama(LlamaConfig::from_json(config));
  LoadedModel out = adapter.load_quantized_model(path, *llama);
  if (loaded != nullptr) *loaded = std::move(out);
  return llama;
}

}  // namespace quantal

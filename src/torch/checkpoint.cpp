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

/// Layers of the file that a model keeps dense: embeddings, by the name of their weight.
std::map<std::string, const PackedMatrix*> packed_weights(
    const Checkpoint& file, const std::set<std::string>& linears,
    const std::map<std::string, std::vector<std::int64_t>>& expected) {
  std::map<std::string, const PackedMatrix*> out;
  for (const auto& [name, matrix] : file.layers) {
    const std::string weight = name.empty() ? "weight" : name + ".weight";
    if (!linears.contains(name) && expected.contains(weight)) out[weight] = &matrix;
  }
  return out;
}

/// Values of a packed matrix in the dtype that its dialect gives them.
torch::Tensor decoded(const PackedMatrix& matrix) {
  return dequantize(to_tensors(matrix.view()), to_torch(matrix.spec.value_dtype));
}

/// Compares names and shapes of a file and a model before anything changes. Returns the weights
/// that are packed in the file and dense in the model.
std::map<std::string, const PackedMatrix*> check_fit(const Checkpoint& file,
                                                     torch::nn::Module& model,
                                                     const std::string& path) {
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
  const auto decode = packed_weights(file, packed, expected);
  for (const auto& [name, matrix] : file.layers) {
    const std::string weight = name.empty() ? "weight" : name + ".weight";
    if (!packed.contains(name) && !decode.contains(weight)) complaints.add("extra", name);
  }
  for (const auto& [name, shape] : expected) {
    const auto found = file.tensors.find(name);
    const auto layer = decode.find(name);
    if (layer != decode.end()) {
      const PackedSpec& spec = layer->second->spec;
      if (shape != std::vector<std::int64_t>{spec.rows, spec.cols}) {
        complaints.add("misshapen", name);
      }
    } else if (found == file.tensors.end()) {
      complaints.add("missing", name);
    } else if (found->second.shape != shape) {
      complaints.add("misshapen", name);
    }
  }
  for (const auto& [name, view] : file.tensors) {
    if (!expected.contains(name)) complaints.add("extra", name);
  }
  complaints.raise(path);
  return decode;
}

LoadOptions options_for(torch::nn::Module& model) {
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const auto& [name, layer] : named_linears(model)) {
    shapes[name] = {layer->out_features, layer->in_features};
  }
  LoadOptions options;
  options.weight_shape = [shapes](const std::string& module) {
    const auto found = shapes.find(module);
    return found == shapes.end() ? std::vector<std::int64_t>{} : found->second;
  };
  return options;
}

}  // namespace

void QuantizationAdapter::save_quantized_model(torch::nn::Module& model, const std::string& path,
                                               const std::string& config_json,
                                               const SaveOptions& options) {
  const torch::NoGradGuard no_grad;
  CheckpointView view;
  view.config_json = config_json;
  for (const auto& [name, layer] : named_linears(model)) {
    if (layer->is_quantized()) {
      view.layers.emplace_back(name, layer->packed->packed().view());
    } else {
      view.dense.push_back(name);
    }
  }
  std::vector<torch::Tensor> contiguous;
  for (auto& [name, tensor] : base_tensors(model)) {
    contiguous.push_back(tensor.detach().contiguous());
    view.tensors.emplace_back(name, tensor_view(contiguous.back()));
  }
  save_checkpoint(path, view, options);
}

void QuantizationAdapter::load_quantized_model(const std::string& path, torch::nn::Module& model) {
  const Checkpoint file = load_checkpoint(path, options_for(model));
  const auto decode = check_fit(file, model, path);
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
  for (auto& [name, tensor] : base_tensors(model)) {
    const auto layer = decode.find(name);
    if (layer == decode.end()) {
      copy_into(file.tensors.at(name), tensor);
    } else {
      tensor.set_data(decoded(*layer->second));
    }
  }
}

}  // namespace quantal

#include "checkpoint/layer_index.h"

#include <set>

#include "checkpoint/json.h"

namespace quantal::checkpoint {
namespace {

std::string prefix_of(const std::string& name) { return name.empty() ? "" : name + "."; }

/// Every dotted prefix of a tensor name, with its dot: "a.b.weight" gives "", "a." and "a.b.".
std::set<std::string> module_prefixes(const TensorSet& set) {
  std::set<std::string> prefixes = {""};
  for (const auto& [name, tensor] : set.tensors) {
    for (std::size_t dot = name.find('.'); dot != std::string::npos;
         dot = name.find('.', dot + 1)) {
      prefixes.insert(name.substr(0, dot + 1));
    }
  }
  return prefixes;
}

/// `quant_method` of config.json in quotes; "" if there is none.
std::string foreign_method(const TensorSet& set) {
  const Json config = parse_json_object(set.config_json(), set.path());
  const auto found = config.find("quantization_config");
  if (found == config.end() || !found->is_object()) return "";
  return found->contains("quant_method") ? dump_json(found->at("quant_method"), -1) : "(unnamed)";
}

/// A dialect looks every tensor up that belongs to a layer; any other would be lost without a word.
void check_rest(const LayerIndex::Layer& layer, const std::string& name,
                const std::map<std::string, HeldTensor>& seen) {
  std::string extra;
  for (const std::string& tensor : layer.tensors) {
    if (seen.count(tensor) == 0) extra += (extra.empty() ? "" : ", ") + tensor;
  }
  if (extra.empty()) return;
  fail(Errc::kCorrupt,
       "checkpoint: layer has tensors that do not belong to " + std::string(layer.dialect->title) +
           ": " + extra,
       {.tensor = name});
}

}  // namespace

std::string message_of(const Error& e) {
  std::string message = e.what();
  for (const char* site : {" (file=", " (tensor=", " (offset="}) {
    const std::size_t at = message.rfind(site);
    if (at != std::string::npos) message.resize(at);
  }
  return message;
}

void rethrow_with_path(const Error& e, const std::string& path, const std::string& layer) {
  if (!e.site().path.empty()) throw e;
  const std::string& tensor = e.site().tensor.empty() ? layer : e.site().tensor;
  throw Error(e.code(), message_of(e), {.path = path, .tensor = tensor, .offset = e.site().offset});
}

LayerIndex::LayerIndex(const TensorSet& set, const LoadOptions& options)
    : set_(set), options_(options), shapes_(set.config_json()) {
  find_layers();
  assign_tensors();
}

void LayerIndex::find_layers() {
  std::map<int, std::map<std::string, std::string>> settings;
  for (const Dialect* dialect : dialects()) {
    if (dialect->read_settings == nullptr) continue;
    try {
      settings[dialect->id] = dialect->read_settings(set_.texts);
    } catch (const Error& e) {
      rethrow_with_path(e, set_.path());
    }
    if (settings[dialect->id].empty()) continue;
    promised_ += (promised_.empty() ? "" : ", ") + std::string(dialect->title);
  }
  if (promised_.empty()) promised_ = foreign_method(set_);
  for (const std::string& prefix : module_prefixes(set_)) {
    const auto has = [&](const std::string& suffix) {
      return set_.tensors.count(prefix + suffix) != 0;
    };
    for (const Dialect* dialect : dialects()) {
      if (!dialect->recognizes(has)) continue;
      const std::string name = prefix.substr(0, prefix.size() - (prefix.empty() ? 0 : 1));
      Layer& layer = layers_[name];
      layer.dialect = dialect;
      const auto& known = settings[dialect->id];
      auto found = known.find(name);
      if (found == known.end()) found = known.find("");
      if (found != known.end()) layer.settings = found->second;
      break;
    }
  }
}

/// The innermost layer around a tensor; null for its bias, which stays a tensor of the model.
LayerIndex::Layer* LayerIndex::owner_of(const std::string& name) {
  std::size_t end = name.rfind('.');
  while (true) {
    const bool root = end == std::string::npos;
    const auto found = layers_.find(root ? "" : name.substr(0, end));
    if (found != layers_.end()) {
      return name.substr(root ? 0 : end + 1) == "bias" ? nullptr : &found->second;
    }
    if (root) return nullptr;
    end = end == 0 ? std::string::npos : name.rfind('.', end - 1);
  }
}

void LayerIndex::assign_tensors() {
  for (const auto& [name, tensor] : set_.tensors) {
    if (Layer* owner = owner_of(name)) {
      owner->tensors.push_back(name);
    } else if (tensor.kind == StateKind::kTensor) {
      dense_.push_back(name);
    } else {
      values_.push_back(name);
    }
  }
}

std::vector<std::int64_t> LayerIndex::weight_shape(const std::string& name) const {
  std::vector<std::int64_t> shape;
  if (options_.weight_shape) shape = options_.weight_shape(name);
  return shape.empty() ? shapes_.find(name) : shape;
}

void LayerIndex::with_layer(const std::string& name,
                            const std::function<void(const StoredLayer&)>& body) const {
  const auto found = layers_.find(name);
  if (found == layers_.end()) {
    fail(Errc::kConfig, "checkpoint: no layer of this name", {.path = set_.path(), .tensor = name});
  }
  const Layer& layer = found->second;
  const std::string prefix = prefix_of(name);
  std::map<std::string, HeldTensor> held;  // node-based: addresses of views stay
  const TensorLookup lookup = [&](const std::string& full) -> const TensorView* {
    const auto stored = set_.tensors.find(full);
    if (stored == set_.tensors.end()) return nullptr;
    auto it = held.find(full);
    if (it == held.end()) it = held.emplace(full, stored->second.read()).first;
    return &it->second.view;
  };
  try {
    const LayerFacts facts{layer.settings, weight_shape(name)};
    const StoredLayer opened = layer.dialect->open_layer(prefix, lookup, facts);
    check_rest(layer, name, held);
    body(opened);
  } catch (const Error& e) {
    rethrow_with_path(e, set_.path(), name);
  }
}

std::string LayerIndex::form_key(const std::string& name) const {
  constexpr std::int64_t kSmallBytes = 512;  // settings that files keep as tensors
  constexpr std::int64_t kSmallTable = 64;   // a table of 16 float32
  const Layer& layer = layers_.at(name);
  const std::string prefix = prefix_of(name);
  std::string key = std::string(layer.dialect->name) + "\n" + layer.settings + "\n" +
                    shape_string(weight_shape(name));
  for (const std::string& full : layer.tensors) {
    const StoredTensor& tensor = set_.tensors.at(full);
    key += "\n" + full.substr(prefix.size()) + " " + std::string(dtype_name(tensor.dtype)) +
           shape_string(tensor.shape);
    if (tensor.bytes() > (is_weight_dtype(tensor.dtype) ? kSmallTable : kSmallBytes)) continue;
    const HeldTensor small = tensor.read();
    key.append(small.view.bytes.begin(), small.view.bytes.end());
  }
  return key;
}

}  // namespace quantal::checkpoint

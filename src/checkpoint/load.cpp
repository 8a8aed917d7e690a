#include <filesystem>
#include <set>

#include "checkpoint/json.h"
#include "checkpoint/tensor_set.h"
#include "quantal/checkpoint.h"

namespace quantal {
namespace {

using checkpoint::TensorSet;

/// Every dotted prefix of a tensor name, with its dot: "a.b.weight" gives "", "a." and "a.b.".
std::set<std::string> module_prefixes(const TensorSet& set) {
  std::set<std::string> prefixes = {""};
  for (const auto& [name, view] : set.tensors) {
    for (std::size_t dot = name.find('.'); dot != std::string::npos;
         dot = name.find('.', dot + 1)) {
      prefixes.insert(name.substr(0, dot + 1));
    }
  }
  return prefixes;
}

const Dialect* find_layer_dialect(const TensorSet& set, const std::string& prefix) {
  const auto has = [&](const std::string& suffix) {
    return set.tensors.count(prefix + suffix) != 0;
  };
  for (const Dialect* dialect : dialects()) {
    if (dialect->recognizes(has)) return dialect;
  }
  return nullptr;
}

/// Throws `e` again with the path that a dialect cannot know.
[[noreturn]] void rethrow_with_path(const Error& e, const std::string& path) {
  if (!e.site().path.empty()) throw e;
  std::string message = e.what();
  for (const char* site : {" (tensor=", " (offset="}) {
    const std::size_t at = message.rfind(site);
    if (at != std::string::npos) message.resize(at);
  }
  throw Error(e.code(), message,
              {.path = path, .tensor = e.site().tensor, .offset = e.site().offset});
}

/// Imports layers and remembers which tensors they are made of.
class LayerReader {
 public:
  explicit LayerReader(const TensorSet& set) : set_(set) {}

  PackedMatrix read(const Dialect& dialect, const std::string& prefix) {
    std::set<std::string> used;
    const TensorLookup lookup = [&](const std::string& name) -> const TensorView* {
      const auto found = set_.tensors.find(name);
      if (found == set_.tensors.end()) return nullptr;
      used.insert(name);
      return &found->second;
    };
    PackedMatrix layer;
    try {
      layer = dialect.import_layer(prefix, lookup, {});
      take_rest(dialect, prefix, layer, used);
    } catch (const Error& e) {
      rethrow_with_path(e, set_.path);
    }
    consumed_.insert(used.begin(), used.end());
    return layer;
  }

  bool consumed(const std::string& name) const { return consumed_.count(name) != 0; }

 private:
  /// Names under the prefix that the import did not look at must be ones that the dialect itself
  /// writes, or the bias; anything else would be lost without a word.
  void take_rest(const Dialect& dialect, const std::string& prefix, const PackedMatrix& layer,
                 std::set<std::string>& used) {
    std::string extra;
    std::set<std::string>& known = suffixes_[dialect.id];
    for (auto it = set_.tensors.lower_bound(prefix);
         it != set_.tensors.end() && it->first.starts_with(prefix); ++it) {
      const std::string suffix = it->first.substr(prefix.size());
      if (suffix == "bias" || used.count(it->first) != 0) continue;
      if (known.empty()) {
        for (const NamedTensor& one : dialect.export_layer(layer.view(), ""))
          known.insert(one.name);
      }
      if (known.count(suffix) != 0) {
        used.insert(it->first);
      } else {
        extra += (extra.empty() ? "" : ", ") + it->first;
      }
    }
    if (extra.empty()) return;
    fail(Errc::kCorrupt,
         "checkpoint: layer has tensors that do not belong to " + std::string(dialect.title) +
             ": " + extra,
         {.tensor = prefix.substr(0, prefix.size() - (prefix.empty() ? 0 : 1))});
  }

  const TensorSet& set_;
  std::set<std::string> consumed_;
  std::map<int, std::set<std::string>> suffixes_;  ///< by dialect id
};

/// A view whose address fits its element type; files do not promise that.
TensorView aligned(const TensorView& view, std::vector<std::shared_ptr<void>>& owners) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.bytes.data());
  if (address % dtype_size(view.dtype) == 0) return view;
  const auto copy =
      std::make_shared<std::vector<std::uint8_t>>(view.bytes.begin(), view.bytes.end());
  owners.push_back(copy);
  return {view.dtype, view.shape, *copy};
}

/// What a folder says about its own quantization: `quant_method` of config.json, MLX's
/// `quantization`, quanto's map. Empty for a dense model.
std::string promised_method(const std::string& config_json, const std::string& path) {
  const auto config = checkpoint::parse_json_object(config_json, path);
  const auto found = config.find("quantization_config");
  if (found != config.end() && !found->is_null()) {
    const bool named = found->is_object() && found->contains("quant_method");
    return named ? checkpoint::dump_json(found->at("quant_method"), -1) : "(unnamed)";
  }
  if (config.contains("quantization")) return "\"mlx\"";
  std::error_code ignored;
  return std::filesystem::exists(path + "/quanto_qmap.json", ignored) ? "\"quanto\"" : "";
}

/// A folder that promises quantized layers but where no dialect finds one is not dense: its packed
/// tensors would pass as weights.
void check_promise(const Checkpoint& checkpoint, const std::string& path) {
  if (!checkpoint.layers.empty()) return;
  const std::string method = promised_method(checkpoint.config_json, path);
  if (method.empty()) return;
  std::string known;
  for (const Dialect* dialect : dialects()) {
    known += (known.empty() ? "" : ", ") + std::string(dialect->title);
  }
  fail(Errc::kUnsupported,
       "checkpoint: quantization method is " + method +
           ", but no layer is stored in a way that is read here (" + known + ")",
       {.path = path});
}

}  // namespace

Checkpoint load_checkpoint(const std::string& path) {
  if (path.ends_with(".gguf")) {
    fail(Errc::kUnsupported,
         "checkpoint: a GGUF file is a source to quantize from, expected a folder or .safetensors "
         "(open it with ModelSource)",
         {.path = path});
  }
  TensorSet set = checkpoint::open_tensor_set(path);
  Checkpoint out;
  out.config_json = set.config_json;
  for (const auto& file : set.files) out.owners.push_back(file);

  LayerReader reader(set);
  for (const std::string& prefix : module_prefixes(set)) {
    const Dialect* dialect = find_layer_dialect(set, prefix);
    if (dialect == nullptr) continue;
    const std::string name = prefix.substr(0, prefix.size() - (prefix.empty() ? 0 : 1));
    out.layers.emplace(name, reader.read(*dialect, prefix));
  }
  for (const auto& [name, view] : set.tensors) {
    if (!reader.consumed(name)) out.tensors.emplace(name, aligned(view, out.owners));
  }
  check_promise(out, path);
  return out;
}

}  // namespace quantal

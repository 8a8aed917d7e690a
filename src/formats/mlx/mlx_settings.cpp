// What stands beside the tensors of an MLX model.
//
//   mlx-lm, npz  config.json: {"quantization": {"group_size": 64, "bits": 4, "mode": "affine",
//                "<module>": {"group_size": 32, "bits": 8}, "<module>": false}} and the same again
//                as "quantization_config". An entry of a module stands alone: what it leaves out is
//                the default of its own mode (mlx_lm.utils.load_model of mlx-lm 0.29.1).
//   guide        mlx_config.json: the same object without the outer name
#include <algorithm>

#include "core/json_text.h"
#include "formats/mlx/mlx_checkpoint.h"

namespace quantal::mlx {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kConfig = "config.json";
constexpr const char* kGuideConfig = "mlx_config.json";

/// The text of a value, for messages.
std::string shown(const Json& value) {
  return value.dump(-1, ' ', true, Json::error_handler_t::replace);
}

[[noreturn]] void corrupt(const std::string& file, const std::string& key,
                          const std::string& text) {
  fail(Errc::kCorrupt, "mlx: " + file + ": " + key + text, {.path = file, .tensor = {}});
}

/// A whole number of an object; `fallback` if it is absent or null.
std::int64_t number(const Json& object, const char* name, std::int64_t fallback,
                    const std::string& file, const std::string& key) {
  const auto it = object.find(name);
  if (it == object.end() || it->is_null()) return fallback;
  if (!it->is_number_integer() || it->get<std::int64_t>() < 1 ||
      it->get<std::int64_t>() > (std::int64_t{1} << 24)) {
    corrupt(file, key + "." + name, " is " + shown(*it) + ", expected a whole number >= 1");
  }
  return it->get<std::int64_t>();
}

/// {"group_size", "bits", "mode"}; missing members are the mode's defaults.
Settings parse_settings(const Json& object, const std::string& file, const std::string& key) {
  Settings out;
  const auto mode = object.find("mode");
  if (mode != object.end() && !mode->is_null()) {
    out.mode = mode->is_string() ? find_mode(mode->get<std::string>()) : nullptr;
    if (out.mode == nullptr) {
      corrupt(file, key + ".mode", " is " + shown(*mode) + ", expected one of " + mode_names());
    }
  }
  out.bits = static_cast<int>(number(object, "bits", out.mode->bits, file, key));
  out.group_size = number(object, "group_size", out.mode->group_size, file, key);
  if (const std::string text = complaint(out); !text.empty()) corrupt(file, key + ": ", text);
  return out;
}

std::string layer_json(const Settings& s, const std::string& dtype) {
  Json json = {{"bits", s.bits}, {"group_size", s.group_size}, {"mode", s.mode->name}};
  if (!dtype.empty()) json["dtype"] = dtype;
  return json.dump();
}

/// The dtype that config.json gives the model, for modes that store none; "" if it says nothing.
std::string model_dtype(const Json& config) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    const auto it = config.find(key);
    if (it == config.end() || !it->is_string()) continue;
    for (const DType d : {DType::kF32, DType::kF16, DType::kBF16}) {
      if (*it == dtype_torch_name(d)) return std::string(dtype_torch_name(d));
    }
  }
  return {};
}

std::map<std::string, std::string> settings_of_block(const Json& block, const std::string& file,
                                                     const std::string& key,
                                                     const std::string& dtype) {
  const Settings global = parse_settings(block, file, key);
  std::map<std::string, std::string> out = {{"", layer_json(global, dtype)}};
  for (const auto& [name, value] : block.items()) {
    if (value.is_object()) {
      out[name] = layer_json(parse_settings(value, file, key + "[\"" + name + "\"]"), dtype);
    } else if (value == true) {
      out[name] = layer_json(global, dtype);
    } else if (value == false) {
      out[name] = Json{{"quantized", false}}.dump();
    }
  }
  return out;
}

/// The settings that most layers share; of equally many the first.
Settings most_common(std::span<const LayerEntry> layers) {
  Settings best;
  std::ptrdiff_t most = 0;
  for (const LayerEntry& layer : layers) {
    const Settings s = settings_of(layer.spec);
    const auto count = std::count_if(layers.begin(), layers.end(),
                                     [&](const LayerEntry& l) { return settings_of(l.spec) == s; });
    if (count > most) {
      most = count;
      best = s;
    }
    if (2 * most >= static_cast<std::ptrdiff_t>(layers.size())) break;
  }
  return best;
}

Json settings_json(const Settings& s, bool with_mode) {
  Json json = {{"group_size", s.group_size}, {"bits", s.bits}};
  if (with_mode || s.mode->mode != Mode::kAffine) json["mode"] = s.mode->name;
  return json;
}

Json block_of(std::span<const LayerEntry> layers, bool with_mode) {
  const Settings global = most_common(layers);
  Json block = settings_json(global, with_mode);
  for (const LayerEntry& layer : layers) {
    const Settings s = settings_of(layer.spec);
    if (s != global) block[layer.name] = settings_json(s, false);
  }
  return block;
}

}  // namespace

const std::array<FileLayout, 5> kLayouts = {{
    {"mlx-lm", "folder with config.json and model.safetensors, as mlx-lm writes it",
     Container::kSafetensors, "model.safetensors", StateTree::kFlat, true},
    {"npz", "folder with config.json and weights.npz (older mlx-lm)", Container::kNpz,
     "weights.npz", StateTree::kFlat},
    {"guide", "folder with mlx_model.npz and mlx_config.json", Container::kNpz, "mlx_model.npz",
     StateTree::kFlat},
    {"single", "one safetensors file with its settings inside", Container::kSafetensors, "",
     StateTree::kFlat},
    {"single-npz", "one npz file with its settings inside", Container::kNpz, "", StateTree::kFlat},
}};

SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> /*dense*/) {
  SideFiles out;
  if (layers.empty()) return out;
  if (layout.name == "guide") {
    const Json block = block_of(layers, false);
    Json ordered = {{"bits", block["bits"]}, {"group_size", block["group_size"]}};
    ordered.update(block);
    out.texts[kGuideConfig] = ordered.dump() + "\n";
    // Settings of another layout would be read before these.
    out.config_patch = Json{{"quantization", nullptr}, {"quantization_config", nullptr}}.dump();
    return out;
  }
  const Json block = block_of(layers, true);
  out.config_patch = Json{{"quantization", block}, {"quantization_config", block}}.dump();
  if (layout.container == Container::kSafetensors) out.metadata["format"] = "mlx";
  return out;
}

std::map<std::string, std::string> read_settings(const SideTexts& texts) {
  std::string dtype;
  if (const auto it = texts.find(kConfig); it != texts.end()) {
    const Json config = parse_json_object<Json>(it->second, kConfig);
    dtype = model_dtype(config);
    const auto block = config.find("quantization");
    if (block != config.end() && block->is_object()) {
      return settings_of_block(*block, kConfig, "quantization", dtype);
    }
    const auto copy = config.find("quantization_config");
    if (copy != config.end() && copy->is_object() && !copy->contains("quant_method") &&
        copy->contains("bits") && copy->contains("group_size")) {
      return settings_of_block(*copy, kConfig, "quantization_config", dtype);
    }
  }
  if (const auto it = texts.find(kGuideConfig); it != texts.end()) {
    return settings_of_block(parse_json_object<Json>(it->second, kGuideConfig), kGuideConfig,
                             kGuideConfig, dtype);
  }
  return {};
}

LayerSettings parse_layer_settings(const std::string& text) {
  const Json json = parse_json_object<Json>(text, "settings of a layer");
  LayerSettings out;
  out.quantized = json.value("quantized", Json(true)) != false;
  if (const auto dtype = json.find("dtype"); dtype != json.end() && dtype->is_string()) {
    out.value_dtype = parse_dtype(dtype->get<std::string>());
    if (!is_weight_dtype(out.value_dtype)) {
      fail(Errc::kConfig,
           "mlx: dtype of a layer is " + shown(*dtype) + ", expected float32, float16 or bfloat16");
    }
  }
  if (json.contains("bits") || json.contains("group_size") || json.contains("mode")) {
    out.settings = parse_settings(json, "settings of the layer", "settings");
  }
  return out;
}

}  // namespace quantal::mlx

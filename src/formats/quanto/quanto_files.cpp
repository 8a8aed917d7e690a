// Files beside the weights. quanto_qmap.json maps module paths to {"weights", "activations"}; two
// keys are ours and ignored upstream: "weight_shape" where groups hide the shape of the weight (see
// entry_of), and "optimizer" where it was not the default one.
#include <array>

#include "core/json_text.h"
#include "formats/quanto/quanto_checkpoint.h"

namespace quantal::quanto {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kMapName = "quanto_qmap.json";
constexpr const char* kShapeKey = "weight_shape";
constexpr std::int64_t kUpstreamGroup = 128;

[[noreturn]] void refuse(const std::string& where, const std::string& text) {
  fail(Errc::kCorrupt, "quanto: " + where + " " + text);
}

QType type_in(const nlohmann::json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return QType::kNone;
  const auto type = it->is_string() ? find_qtype(it->get<std::string>()) : std::nullopt;
  if (!type) {
    refuse(where, std::string("has ") + key + " " + it->dump() +
                      ", expected one of none, qint2, qint4, qint8, qfloat8_e4m3fn, "
                      "qfloat8_e5m2, qfloat8_e4m3fnuz");
  }
  return *type;
}

/// Settings of the guide's files: {"bits": 4, "group_size": 128}. Their group_size is what was
/// asked for, not what the tensors hold, and says nothing. 8 bits may be int8 or float8: left to
/// the tensors.
QType type_of_bits(const nlohmann::json& object, const std::string& where) {
  const auto it = object.find("bits");
  if (it == object.end()) return QType::kNone;
  const std::int64_t bits = it->is_number_integer() ? it->get<std::int64_t>() : 0;
  if (bits == 2) return QType::kInt2;
  if (bits == 4) return QType::kInt4;
  if (bits != 8) refuse(where, "has bits " + it->dump() + ", expected one of 2, 4, 8");
  return QType::kNone;
}

/// True if upstream's modules would form the same groups from the shape of the weight.
bool has_module_groups(const PackedSpec& spec) {
  if (spec.bits == 8) return true;
  const std::int64_t group = upstream_group_size(spec.cols);
  return spec.group_map == GroupMap::kRowRuns &&
         spec.group_size == (group == 0 ? spec.cols : group);
}

enum class Shapes { kUnlessModule, kUnlessEvident };

/// One entry of the map. Upstream's own map has no shapes: ours adds them only to layers that its
/// modules could not hold, or whose shape neither the tensors nor config.json tell; the settings of
/// the guide's layouts, which are no upstream files, add them wherever the tensors hide them.
Json entry_of(const LayerEntry& layer, Shapes shapes) {
  const PackedSpec& spec = layer.spec;
  const Flags flags = Flags::from_int(spec.dialect_flags);
  Json entry = {{"weights", qtype_name(qtype_of(spec))},
                {"activations", qtype_name(flags.activations)}};
  if (flags.optimize) entry["optimizer"] = "hqq";
  const bool evident = shape_is_evident(spec);
  const bool known = shapes == Shapes::kUnlessModule
                         ? has_module_groups(spec) && (evident || layer.shape_known)
                         : evident;
  if (!known) entry[kShapeKey] = {spec.rows, spec.cols};
  return entry;
}

Json map_of(std::span<const LayerEntry> layers, Shapes shapes) {
  Json map = Json::object();
  for (const LayerEntry& layer : layers) map[layer.name] = entry_of(layer, shapes);
  return map;
}

/// What the guide's settings can say about all layers at once.
Json guide_settings(std::span<const LayerEntry> layers) {
  std::int64_t group = kUpstreamGroup;
  for (const LayerEntry& layer : layers) {
    const bool grouped = layer.spec.bits < 8 && layer.spec.group_size < layer.spec.cols;
    if (grouped && layer.spec.group_map == GroupMap::kRowRuns) group = layer.spec.group_size;
  }
  const int bits = layers.empty() ? 8 : layers.front().spec.bits;
  return {{"bits", bits}, {"group_size", group}};
}

/// True if those settings and the tensors leave something unsaid.
bool needs_map(std::span<const LayerEntry> layers) {
  for (const LayerEntry& layer : layers) {
    const bool more = layer.spec.bits != layers.front().spec.bits;
    if (more || entry_of(layer, Shapes::kUnlessEvident).size() > 2 ||
        Flags::from_int(layer.spec.dialect_flags).activations != QType::kNone) {
      return true;
    }
  }
  return false;
}

/// Settings of one layer in the form of open_layer.
std::string layer_text(const nlohmann::json& entry, const std::string& where) {
  Json out = {{"weights", qtype_name(type_in(entry, "weights", where))},
              {"activations", qtype_name(type_in(entry, "activations", where))}};
  if (entry.contains("optimizer")) out["optimizer"] = entry["optimizer"];
  if (entry.contains(kShapeKey)) out[kShapeKey] = entry[kShapeKey];
  return out.dump();
}

void read_map(const nlohmann::json& map, const std::string& where,
              std::map<std::string, std::string>& out) {
  for (const auto& [name, entry] : map.items()) {
    const std::string at = where + ", module " + name;
    if (!entry.is_object()) refuse(at, "is not an object");
    out[name] = layer_text(entry, at);
  }
}

/// {"bits", "group_size", "modules"} or {"weights", "activations"}, for all layers.
void read_common(const nlohmann::json& settings, const std::string& where,
                 std::map<std::string, std::string>& out) {
  QType weights = type_in(settings, "weights", where);
  if (weights == QType::kNone) weights = type_of_bits(settings, where);
  const Json common = {{"weights", qtype_name(weights)},
                       {"activations", qtype_name(type_in(settings, "activations", where))}};
  out[""] = common.dump();
  if (settings.contains("modules") && settings["modules"].is_object()) {
    read_map(settings["modules"], where, out);
  }
}

}  // namespace

constinit const std::array<FileLayout, 4> kLayouts = {{
    {"quanto", "optimum-quanto folder: model.safetensors and quanto_qmap.json",
     Container::kSafetensors, "model.safetensors", StateTree::kFlat},
    {"guide", "folder with pytorch_model.bin and quantization_config in config.json",
     Container::kTorch, "pytorch_model.bin", StateTree::kFlat},
    {"single", "one torch file {state_dict, quanto_config}", Container::kTorch, "",
     StateTree::kFlat},
    {"single-safetensors", "one safetensors file with its settings inside", Container::kSafetensors,
     "", StateTree::kFlat},
}};

bool shape_is_evident(const PackedSpec& spec) {
  if (spec.bits == 8) return true;
  const Grouped g = grouped_of(spec);
  if (g.columns || Flags::from_int(spec.dialect_flags).per_tensor) return false;
  const auto shapes = possible_shapes(g.rows, g.cols, 0);
  return shapes.size() == 1 && shapes[0][1] == spec.cols;
}

LayerSettings parse_layer_settings(const std::string& text, const std::string& where) {
  const auto json = parse_json_object(text, "settings of " + where);
  LayerSettings out;
  out.weights = type_in(json, "weights", where);
  out.activations = type_in(json, "activations", where);
  out.optimize = json.contains("optimizer") && json["optimizer"] == "hqq";
  const auto shape = json.find(kShapeKey);
  if (shape == json.end()) return out;
  if (!shape->is_array()) refuse(where, "has weight_shape " + shape->dump() + ", expected a list");
  for (const auto& size : *shape) {
    if (!size.is_number_integer()) {
      refuse(where, "has weight_shape " + shape->dump() + ", expected integers");
    }
    out.weight_shape.push_back(size.get<std::int64_t>());
  }
  return out;
}

SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> /*dense*/) {
  SideFiles out;
  if (layout.container == Container::kSafetensors) {
    out.texts[kMapName] = map_of(layers, Shapes::kUnlessModule).dump(4);
    out.metadata["format"] = "pt";
    Json patch = {{"quantization_config", nullptr}};
    for (const LayerEntry& layer : layers) {
      // A quantized output layer holds its own numbers, whatever the embeddings are.
      if (layer.name == "lm_head") patch["tie_word_embeddings"] = false;
    }
    out.config_patch = patch.dump();
    return out;
  }
  Json settings = guide_settings(layers);
  if (layout.name == "single") {
    if (needs_map(layers)) settings["modules"] = map_of(layers, Shapes::kUnlessEvident);
    out.embedded = settings.dump();
    out.embedded_key = "quanto_config";
    return out;
  }
  Json config = {{"quant_method", "quanto"}};
  config.update(settings);
  out.config_patch = Json{{"quantization_config", config}}.dump();
  if (needs_map(layers)) out.texts[kMapName] = map_of(layers, Shapes::kUnlessEvident).dump(4);
  return out;
}

std::map<std::string, std::string> read_settings(const SideTexts& texts) {
  std::map<std::string, std::string> out;
  if (const auto config = texts.find("config.json"); config != texts.end()) {
    const auto json = parse_json_object(config->second, "config.json");
    const auto settings = json.find("quantization_config");
    if (settings != json.end() && settings->is_object() &&
        settings->value("quant_method", nlohmann::json()) == "quanto") {
      read_common(*settings, "config.json, quantization_config", out);
    }
  }
  if (const auto embedded = texts.find("embedded"); embedded != texts.end()) {
    const auto json = parse_json_object(embedded->second, "embedded settings");
    if (json.contains("bits") || json.contains("weights")) {
      read_common(json, "quanto_config", out);
    }
  }
  if (const auto map = texts.find(kMapName); map != texts.end()) {
    read_map(parse_json_object(map->second, kMapName), kMapName, out);
  }
  return out;
}

}  // namespace quantal::quanto

#include "formats/hqq/hqq_settings.h"

#include <algorithm>
#include <cctype>

#include "core/json_text.h"
#include "formats/hqq/hqq_meta.h"
#include "formats/hqq/hqq_params.h"

namespace quantal::hqq {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kConfigFile = "config.json";
constexpr const char* kGuideFile = "hqq_config.json";

/// `nbits` as a number of JSON.
Json width_of(const PackedSpec& spec, const Flags& flags) {
  constexpr double kTernary = 1.58;
  return flags.ternary ? Json(kTernary) : Json(spec.bits);
}

Json group_size_of(const PackedSpec& spec, const Flags& flags) {
  if (flags.no_group_size) return nullptr;
  return flags.channel_wise ? spec.group_size : flags.stored_group_size;
}

/// What upstream's configuration says of one layer.
Json weight_params(const PackedSpec& spec) {
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const bool columns = spec.group_map == GroupMap::kColumnRuns || flags.along_columns;
  Json json;
  json["nbits"] = width_of(spec, flags);
  json["channel_wise"] = flags.channel_wise;
  json["group_size"] = group_size_of(spec, flags);
  json["optimize"] = flags.optimize;
  json["round_zero"] = flags.round_zero;
  json["axis"] = columns ? 0 : 1;
  json["view_as_float"] = flags.view_as_float;
  return json;
}

Json layer_config(const Json& weight, bool offload_meta) {
  Json json;
  json["weight_quant_params"] = weight;
  json["scale_quant_params"] = nullptr;
  json["zero_quant_params"] = nullptr;
  json["offload_meta"] = offload_meta;
  return json;
}

/// Name of a kind of layer, without blocks and their numbers: model.layers.3.self_attn.q_proj is
/// self_attn.q_proj.
std::string tag_of(const std::string& name) {
  std::string tag;
  for (std::size_t at = 0; at <= name.size();) {
    const std::size_t dot = std::min(name.find('.', at), name.size());
    const std::string part = name.substr(at, dot - at);
    const bool number = !part.empty() && std::all_of(part.begin(), part.end(), [](char c) {
      return std::isdigit(static_cast<unsigned char>(c)) != 0;
    });
    if (part != "model" && part != "layers" && !number) tag += (tag.empty() ? "" : ".") + part;
    at = dot + 1;
  }
  return tag;
}

/// One set of parameters if all layers agree, else one per tag (of its first layer).
Json quant_config(std::span<const LayerEntry> layers) {
  Json by_tag = Json::object();
  bool uniform = true;
  Json first;
  for (const LayerEntry& layer : layers) {
    const bool offload = Flags::from_int(layer.spec.dialect_flags).offload_meta;
    const Json config = layer_config(weight_params(layer.spec), offload);
    if (first.is_null()) first = config;
    uniform = uniform && config == first;
    const std::string tag = tag_of(layer.name);
    if (!by_tag.contains(tag)) by_tag[tag] = config;
  }
  if (layers.empty()) return layer_config(weight_params(PackedSpec{}), false);
  return uniform ? first : by_tag;
}

Json transformers_config(Json config, std::span<const std::string> skip) {
  Json json;
  json["quant_method"] = "hqq";
  json["quant_config"] = std::move(config);
  json["skip_modules"] = std::vector<std::string>(skip.begin(), skip.end());
  return json;
}

/// Settings of the first layer, as the loading guide spells them.
Json guide_config(std::span<const LayerEntry> layers) {
  const PackedSpec spec = layers.empty() ? PackedSpec{} : layers.front().spec;
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const auto meta = [](bool used, std::int64_t group_size) {
    if (!used) return Json(nullptr);
    Json params = {{"nbits", kMetaBits}, {"group_size", nullptr}};
    if (group_size != 0) params["group_size"] = group_size;
    return params;
  };
  Json json;
  json["weight_quant_params"] = {{"nbits", width_of(spec, flags)},
                                 {"group_size", group_size_of(spec, flags)},
                                 {"quant_zero", flags.quant_zero},
                                 {"quant_scale", flags.quant_scale}};
  json["scale_quant_params"] = meta(flags.quant_scale, kScaleMetaGroup);
  json["zero_quant_params"] = meta(flags.quant_zero, kZeroMetaGroup);
  return json;
}

// ------------------------------------------------------------------ reading

[[noreturn]] void corrupt(const std::string& file, const std::string& text) {
  fail(Errc::kCorrupt, "hqq: " + text, {.path = file, .tensor = {}});
}

/// weight_quant_params of one set of parameters, checked.
std::string checked_params(const nlohmann::json& config, const std::string& key,
                           const std::string& file) {
  const auto weight = config.is_object() ? config.find("weight_quant_params") : config.end();
  if (!config.is_object() || weight == config.end() || !weight->is_object()) {
    corrupt(file, key + " has no object weight_quant_params");
  }
  const auto bits = weight->value("nbits", nlohmann::json());
  if (!bits.is_number()) {
    corrupt(file, key + ".weight_quant_params.nbits is " + bits.dump(-1, ' ', true) +
                      ", expected a number");
  }
  return weight->dump();
}

std::map<std::string, std::string> transformers_settings(const nlohmann::json& quantization) {
  const auto config = quantization.value("quant_config", nlohmann::json());
  if (!config.is_object()) {
    corrupt(kConfigFile, "quantization_config.quant_config is " + config.dump(-1, ' ', true) +
                             ", expected an object");
  }
  if (config.contains("weight_quant_params")) {
    return {{"", checked_params(config, "quant_config", kConfigFile)}};
  }
  // Keys are tags, not modules: they are checked, and the layers' own fields decide.
  for (const auto& [tag, params] : config.items()) {
    if (!params.is_null()) checked_params(params, "quant_config." + tag, kConfigFile);
  }
  return {{"", "{}"}};
}

}  // namespace

const std::array<FileLayout, 6> kLayouts = {{
    {.name = "transformers",
     .title = "folder with config.json and model.safetensors, as transformers writes it",
     .container = Container::kSafetensors,
     .weights = "model.safetensors",
     .tree = StateTree::kFlat},
    {.name = "hqq",
     .title = "folder with model.safetensors as hqq writes it; config.json is the plain model's",
     .container = Container::kSafetensors,
     .weights = "model.safetensors",
     .tree = StateTree::kFlat},
    {.name = "qmodel",
     .title = "folder with qmodel.pt as hqq writes it; config.json is the plain model's",
     .container = Container::kTorch,
     .weights = "qmodel.pt",
     .tree = StateTree::kByModule,
     .names_tied_head = true},
    {.name = "guide",
     .title = "folder with hqq_model.pt and hqq_config.json",
     .container = Container::kTorch,
     .weights = "hqq_model.pt",
     .tree = StateTree::kMetaDict},
    {.name = "single",
     .title = "one torch file of the state dict, as hqq_model.pt",
     .container = Container::kTorch,
     .weights = {},
     .tree = StateTree::kMetaDict},
    {.name = "single-safetensors",
     .title = "one safetensors file with its settings inside",
     .container = Container::kSafetensors,
     .weights = {},
     .tree = StateTree::kFlat},
}};

SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense) {
  SideFiles out;
  if (layout.name == "transformers") {
    out.config_patch =
        Json{{"quantization_config", transformers_config(quant_config(layers), dense)}}.dump();
    return out;
  }
  out.config_patch = Json{{"quantization_config", nullptr}}.dump();
  if (layout.name == "guide" || layout.name == "single-safetensors")
    out.texts[kGuideFile] = guide_config(layers).dump(4) + "\n";
  return out;
}

std::map<std::string, std::string> read_settings(const SideTexts& texts) {
  if (const auto it = texts.find(kConfigFile); it != texts.end()) {
    const nlohmann::json config = parse_json_object(it->second, kConfigFile);
    const auto quantization = config.find("quantization_config");
    if (quantization != config.end() && quantization->is_object() &&
        quantization->value("quant_method", nlohmann::json()) == "hqq") {
      return transformers_settings(*quantization);
    }
  }
  if (const auto it = texts.find(kGuideFile); it != texts.end()) {
    const nlohmann::json config = parse_json_object(it->second, kGuideFile);
    return {{"", checked_params(config, kGuideFile, kGuideFile)}};
  }
  return {};
}

}  // namespace quantal::hqq

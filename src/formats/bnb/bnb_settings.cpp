// What stands beside the tensors of a bitsandbytes model.
//
//   transformers  config.json: {"quantization_config": {"quant_method": "bitsandbytes", ...}};
//   which
//                 layers are quantized, and the block size, are in the tensors
//   guide         quantization_config.json: {"bits", "quant_type", "compute_dtype"}; a hint
//   single        nothing
//   single-safetensors
//                 as guide, in the metadata of the file
#include <algorithm>
#include <cmath>

#include "core/json_text.h"
#include "formats/bnb/bnb_checkpoint.h"
#include "formats/bnb/bnb_params.h"

namespace quantal::bnb {
namespace {

using Json = nlohmann::ordered_json;

/// What a model's settings say; the defaults are those of transformers' 8-bit config.
struct Settings {
  bool four_bit = false;
  std::string_view compute_dtype = "float32";
  std::string_view storage = "uint8";
  std::string_view quant_type = "fp4";
  bool double_quant = false;
  float threshold = kDefaultThreshold;
};

/// The settings of a model are those of its first layer of the width; a model of no layers is
/// written as 4-bit NF4.
Settings settings_of(std::span<const LayerEntry> layers, bool four_bit) {
  Settings s;
  s.four_bit = four_bit;
  if (four_bit) s.quant_type = "nf4";
  const auto chosen = [&](const LayerEntry& l) { return is_int8(l.spec) != four_bit; };
  const auto it = std::find_if(layers.begin(), layers.end(), chosen);
  if (it == layers.end()) return s;
  const Flags flags = Flags::from_int(it->spec.dialect_flags);
  s.threshold = flags.threshold;
  if (!four_bit) return s;
  s.compute_dtype = dtype_torch_name(it->spec.value_dtype);
  s.storage = dtype_torch_name(flags.storage);
  s.quant_type = flags.fp4 ? "fp4" : "nf4";
  s.double_quant = std::any_of(layers.begin(), layers.end(), [](const LayerEntry& l) {
    return l.spec.scale == ScaleSource::kNestedU8;
  });
  return s;
}

Json transformers_config(const Settings& s, std::span<const std::string> skip) {
  Json json;
  json["_load_in_4bit"] = s.four_bit;
  json["_load_in_8bit"] = !s.four_bit;
  json["bnb_4bit_compute_dtype"] = s.compute_dtype;
  json["bnb_4bit_quant_storage"] = s.storage;
  json["bnb_4bit_quant_type"] = s.quant_type;
  json["bnb_4bit_use_double_quant"] = s.double_quant;
  json["llm_int8_enable_fp32_cpu_offload"] = false;
  json["llm_int8_has_fp16_weight"] = false;
  json["llm_int8_skip_modules"] = std::vector<std::string>(skip.begin(), skip.end());
  json["llm_int8_threshold"] = static_cast<double>(s.threshold);
  json["load_in_4bit"] = s.four_bit;
  json["load_in_8bit"] = !s.four_bit;
  json["quant_method"] = "bitsandbytes";
  return json;
}

Json guide_config(const Settings& s) {
  Json json;
  json["bits"] = s.four_bit ? 4 : 8;
  json["quant_type"] = s.quant_type;
  json["compute_dtype"] = s.compute_dtype;
  if (s.threshold != kDefaultThreshold) {
    json["llm_int8_threshold"] = static_cast<double>(s.threshold);
  }
  return json;
}

[[noreturn]] void corrupt(const std::string& file, const std::string& text) {
  fail(Errc::kCorrupt, "bnb: " + text, {.path = file, .tensor = {}});
}

/// The members that open_layer reads, checked; "{}" if there is none.
std::string layer_settings(const nlohmann::json& config, const std::string& file) {
  const auto it = config.find("llm_int8_threshold");
  if (it == config.end() || it->is_null()) return "{}";
  const double threshold = it->is_number() ? it->get<double>() : -1;
  if (!std::isfinite(static_cast<float>(threshold)) || threshold < 0) {
    corrupt(file, "llm_int8_threshold is " + it->dump(-1, ' ', true) + ", expected a number >= 0");
  }
  return nlohmann::json{{"llm_int8_threshold", threshold}}.dump();
}

}  // namespace

const std::array<FileLayout, 4> kLayouts = {{
    {"transformers", "folder with config.json and model.safetensors, as transformers writes it",
     Container::kSafetensors, "model.safetensors", StateTree::kFlat},
    {"guide", "folder with pytorch_model.bin and quantization_config.json", Container::kTorch,
     "pytorch_model.bin", StateTree::kFlat},
    {"single", "one torch file of the state dict", Container::kTorch, "", StateTree::kFlat},
    {"single-safetensors", "one safetensors file with its settings inside", Container::kSafetensors,
     "", StateTree::kFlat},
}};

SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense) {
  const auto has_width = [&](bool int8) {
    return std::any_of(layers.begin(), layers.end(),
                       [&](const LayerEntry& l) { return is_int8(l.spec) == int8; });
  };
  const bool four_bit = has_width(false) || layers.empty();
  SideFiles out;
  if (layout.name == "transformers") {
    if (four_bit && has_width(true)) {
      fail(Errc::kUnsupported,
           "bnb: layers have 4 and 8 bits, expected one width in the layout transformers (its "
           "config says load_in_4bit or load_in_8bit; the layouts guide and single hold both)");
    }
    out.config_patch =
        Json{{"quantization_config", transformers_config(settings_of(layers, four_bit), dense)}}
            .dump();
  } else if (layout.name != "single") {
    out.texts["quantization_config.json"] =
        guide_config(settings_of(layers, four_bit)).dump(4) + "\n";
  }
  return out;
}

std::map<std::string, std::string> read_settings(const SideTexts& texts) {
  constexpr const char* kGuide = "quantization_config.json";
  constexpr const char* kConfig = "config.json";
  if (const auto it = texts.find(kConfig); it != texts.end()) {
    const nlohmann::json config = parse_json_object(it->second, kConfig);
    const auto quantization = config.find("quantization_config");
    if (quantization != config.end() && quantization->is_object() &&
        quantization->value("quant_method", nlohmann::json()) == "bitsandbytes") {
      return {{"", layer_settings(*quantization, kConfig)}};
    }
  }
  if (const auto it = texts.find(kGuide); it != texts.end()) {
    const nlohmann::json config = parse_json_object(it->second, kGuide);
    const auto bits = config.value("bits", nlohmann::json());
    if (bits != 4 && bits != 8) {
      corrupt(kGuide, "bits is " + bits.dump(-1, ' ', true) + ", expected one of 4, 8");
    }
    return {{"", layer_settings(config, kGuide)}};
  }
  return {};
}

}  // namespace quantal::bnb

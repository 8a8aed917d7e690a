// config.json of a llama model as the llama.* pairs of a GGUF file; the inverse of gguf_config.cpp.
#include <cmath>
#include <limits>
#include <numbers>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_rope.h"
#include "checkpoint/json.h"

namespace quantal::checkpoint {
namespace {

constexpr const char* kFile = "config.json";

[[noreturn]] void refuse(Errc code, const std::string& key, const std::string& what) {
  fail(code, "gguf: config " + what, {.path = kFile, .tensor = key});
}

std::int64_t integer(const Json& config, const char* key, std::int64_t fallback) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) {
    if (fallback > 0) return fallback;
    refuse(Errc::kConfig, key, "has no such key, expected an integer above 0");
  }
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (!found->is_number_integer() || found->get<std::int64_t>() < 1 ||
      found->get<std::int64_t>() > kMost) {
    refuse(Errc::kConfig, key, "value is " + found->dump() + ", expected an integer above 0");
  }
  return found->get<std::int64_t>();
}

double real(const Json& object, const char* key, double fallback) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return fallback;
  if (!found->is_number() || !std::isfinite(found->get<double>())) {
    refuse(Errc::kConfig, key, "value is " + found->dump() + ", expected a finite number");
  }
  return found->get<double>();
}

std::string text(const Json& object, const char* key, const std::string& fallback) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return fallback;
  if (!found->is_string()) {
    refuse(Errc::kConfig, key, "value is " + found->dump() + ", expected a string");
  }
  return found->get<std::string>();
}

/// Rotary settings: rope_theta and rope_scaling, or both in rope_parameters.
struct Rope {
  double theta = 10000;
  std::string type = "default";
  Json scaling = Json::object();
};

Rope rope_of(const Json& config) {
  Rope rope;
  rope.theta = real(config, "rope_theta", 10000.0);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const auto found = config.find(key);
    if (found == config.end() || found->is_null()) continue;
    if (!found->is_object()) refuse(Errc::kConfig, key, "value is no object, expected one");
    rope.scaling = *found;
    rope.theta = real(*found, "rope_theta", rope.theta);
    rope.type = text(*found, "rope_type", text(*found, "type", "default"));
  }
  if (rope.type != "default" && rope.type != "linear" && rope.type != "llama3") {
    refuse(Errc::kUnsupported, "rope_scaling",
           "rope type is \"" + rope.type + "\", expected default, linear or llama3");
  }
  return rope;
}

GgufPair pair_u32(const std::string& key, std::int64_t value) {
  return {key, GgufType::kU32, static_cast<std::uint64_t>(value)};
}

GgufPair pair_f32(const std::string& key, double value) { return {key, GgufType::kF32, value}; }

void check_architecture(const Json& config) {
  const std::string type = text(config, "model_type", "(none)");
  if (type != "llama") {
    refuse(Errc::kUnsupported, "model_type", "model_type is \"" + type + "\", expected \"llama\"");
  }
  const std::string activation = text(config, "hidden_act", "silu");
  if (activation != "silu") {
    refuse(Errc::kUnsupported, "hidden_act",
           "hidden_act is \"" + activation + "\", expected \"silu\"");
  }
}

}  // namespace

std::vector<GgufPair> gguf_llama_pairs(const std::string& config_json, std::int64_t vocab) {
  const Json config = parse_json_object(config_json, kFile);
  check_architecture(config);
  const std::int64_t hidden = integer(config, "hidden_size", 0);
  const std::int64_t heads = integer(config, "num_attention_heads", 0);
  const std::int64_t head_dim = integer(config, "head_dim", hidden / heads);
  const Rope rope = rope_of(config);
  std::vector<GgufPair> out = {
      {"general.architecture", GgufType::kString, std::string("llama")},
      pair_u32("llama.block_count", integer(config, "num_hidden_layers", 0)),
      pair_u32("llama.context_length", integer(config, "max_position_embeddings", 2048)),
      pair_u32("llama.embedding_length", hidden),
      pair_u32("llama.feed_forward_length", integer(config, "intermediate_size", 0)),
      pair_u32("llama.attention.head_count", heads),
      pair_u32("llama.attention.head_count_kv", integer(config, "num_key_value_heads", heads)),
      pair_f32("llama.attention.layer_norm_rms_epsilon", real(config, "rms_norm_eps", 1e-6)),
      pair_u32("llama.attention.key_length", head_dim),
      pair_u32("llama.attention.value_length", head_dim),
      pair_f32("llama.rope.freq_base", rope.theta),
      pair_u32("llama.rope.dimension_count", head_dim),
      pair_u32("llama.vocab_size", vocab),
  };
  if (rope.type == "linear") {
    out.push_back({"llama.rope.scaling.type", GgufType::kString, std::string("linear")});
    out.push_back(pair_f32("llama.rope.scaling.factor", real(rope.scaling, "factor", 1.0)));
  }
  return out;
}

std::vector<float> gguf_rope_factors(const std::string& config_json) {
  const Json config = parse_json_object(config_json, kFile);
  const Rope rope = rope_of(config);
  if (rope.type != "llama3") return {};
  const Llama3Rope rule = {
      .factor = real(rope.scaling, "factor", 8.0),
      .low = real(rope.scaling, "low_freq_factor", 1.0),
      .high = real(rope.scaling, "high_freq_factor", 4.0),
      .old_context = real(rope.scaling, "original_max_position_embeddings", 8192.0)};
  const std::int64_t hidden = integer(config, "hidden_size", 0);
  const std::int64_t head_dim =
      integer(config, "head_dim", hidden / integer(config, "num_attention_heads", 0));
  std::vector<float> factors;
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const double exponent = static_cast<double>(i) / static_cast<double>(head_dim);
    const double wavelength = 2 * std::numbers::pi * std::pow(rope.theta, exponent);
    factors.push_back(static_cast<float>(llama3_factor(wavelength, rule)));
  }
  return factors;
}

}  // namespace quantal::checkpoint

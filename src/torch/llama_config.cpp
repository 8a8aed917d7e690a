#include <nlohmann/json.hpp>
#include <string>

#include "quantal/torch/llama.h"

namespace quantal {
namespace {

using Json = nlohmann::json;

std::int64_t size_of(const Json& json, const char* key, std::int64_t otherwise = -1) {
  const bool absent = !json.contains(key) || json[key].is_null();
  if (absent && otherwise < 0)
    fail(Errc::kConfig, std::string("llama config: ") + key + " is missing");
  const std::int64_t value = absent ? otherwise : json[key].get<std::int64_t>();
  if (value < 1 || value > (std::int64_t{1} << 31)) {
    fail(Errc::kConfig, std::string("llama config: ") + key + " is " + std::to_string(value) +
                            ", expected 1 .. 2^31");
  }
  return value;
}

void refuse_other_kinds(const Json& json) {
  const std::string type = json.value("model_type", "llama");
  if (type != "llama") {
    fail(Errc::kUnsupported, "llama config: model_type is " + type + ", expected llama");
  }
  const std::string activation = json.value("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(Errc::kUnsupported, "llama config: hidden_act is " + activation + ", expected silu");
  }
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!json.contains(key) || !json[key].is_object()) continue;
    const std::string kind = json[key].value("rope_type", json[key].value("type", "default"));
    if (kind != "default") {
      fail(Errc::kUnsupported,
           std::string("llama config: ") + key + " is of type " + kind + ", expected default");
    }
  }
}

void check_heads(const LlamaConfig& c) {
  if (c.num_attention_heads % c.num_key_value_heads != 0) {
    fail(Errc::kConfig, "llama config: num_attention_heads is " +
                            std::to_string(c.num_attention_heads) + ", expected a multiple of " +
                            "num_key_value_heads " + std::to_string(c.num_key_value_heads));
  }
  if (c.head_dim % 2 != 0) {
    fail(Errc::kConfig,
         "llama config: head_dim is " + std::to_string(c.head_dim) + ", expected an even number");
  }
}

LlamaConfig parse(const Json& json) {
  refuse_other_kinds(json);
  LlamaConfig c;
  c.vocab_size = size_of(json, "vocab_size");
  c.hidden_size = size_of(json, "hidden_size");
  c.intermediate_size = size_of(json, "intermediate_size");
  c.num_hidden_layers = size_of(json, "num_hidden_layers");
  c.num_attention_heads = size_of(json, "num_attention_heads");
  c.num_key_value_heads = size_of(json, "num_key_value_heads", c.num_attention_heads);
  c.head_dim =
      size_of(json, "head_dim", std::max<std::int64_t>(c.hidden_size / c.num_attention_heads, 1));
  c.max_position_embeddings = size_of(json, "max_position_embeddings", 2048);
  c.rms_norm_eps = json.value("rms_norm_eps", 1e-6);
  c.rope_theta = json.value("rope_theta", 10000.0);
  if (json.contains("rope_parameters") && json["rope_parameters"].is_object()) {
    c.rope_theta = json["rope_parameters"].value("rope_theta", c.rope_theta);
  }
  c.tie_word_embeddings = json.value("tie_word_embeddings", false);
  c.attention_bias = json.value("attention_bias", false);
  c.mlp_bias = json.value("mlp_bias", false);
  if (json.contains("eos_token_id") && json["eos_token_id"].is_number_integer()) {
    c.eos_token_ids = {json["eos_token_id"].get<std::int64_t>()};
  } else if (json.contains("eos_token_id") && json["eos_token_id"].is_array()) {
    c.eos_token_ids = json["eos_token_id"].get<std::vector<std::int64_t>>();
  }
  check_heads(c);
  return c;
}

}  // namespace

LlamaConfig LlamaConfig::from_json(const std::string& text) {
  try {
    LlamaConfig config = parse(Json::parse(text));
    config.json = text;
    return config;
  } catch (const Json::exception& error) {
    fail(Errc::kConfig, std::string("llama config: ") + error.what());
  }
}

}  // namespace quantal

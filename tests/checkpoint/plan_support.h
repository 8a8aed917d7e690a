// What the tests of the planner share: forms, rows and phases by name, and model folders that are
// headers and holes.
#pragma once

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/support.h"
#include "quantal/plan.h"

namespace quantal::testing {

using nlohmann::json;
using M = QuantizationMethod;

inline std::string model_path(const std::string& name) {
  return golden_path("checkpoints/" + name);
}

inline QuantizationConfig config_of(M method, int bits, std::int64_t group = 32) {
  QuantizationConfig config;
  config.method = method;
  config.bits = bits;
  config.bits_set = true;
  config.group_size = group;
  return config;
}

inline PlanOptions options_of(const QuantizationConfig& config) {
  PlanOptions options;
  options.config = config;
  options.support = Support::kExtended;
  return options;
}

inline const PlanLayer& layer_of(const Plan& plan, const std::string& name) {
  for (const PlanLayer& layer : plan.layers) {
    if (layer.name == name) return layer;
  }
  throw std::runtime_error("no layer " + name);
}

inline const PlanPhase& phase_of(const Plan& plan, const std::string& name) {
  for (const PlanPhase& phase : plan.phases) {
    if (phase.name == name) return phase;
  }
  throw std::runtime_error("no phase " + name);
}

inline std::int64_t part_of(const PlanPhase& phase, PlanPart part) {
  return phase.bytes[static_cast<std::size_t>(part)];
}

// ------------------------------------------------------------------ headers without weights

struct LlamaSizes {
  std::int64_t hidden, intermediate, blocks, heads, key_value_heads, vocabulary;
};
inline constexpr LlamaSizes kLlama7b = {4096, 11008, 32, 32, 32, 32000};
inline constexpr LlamaSizes kLlama70b = {8192, 28672, 80, 64, 8, 128256};
inline constexpr LlamaSizes kLlama405b = {16384, 53248, 126, 128, 8, 128256};

inline std::vector<std::pair<std::string, std::vector<std::int64_t>>> llama_tensors(
    const LlamaSizes& s) {
  const std::int64_t kv = s.hidden / s.heads * s.key_value_heads;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> out = {
      {"lm_head.weight", {s.vocabulary, s.hidden}},
      {"model.embed_tokens.weight", {s.vocabulary, s.hidden}},
      {"model.norm.weight", {s.hidden}}};
  for (std::int64_t i = 0; i < s.blocks; ++i) {
    const std::string block = "model.layers." + std::to_string(i) + ".";
    out.push_back({block + "self_attn.q_proj.weight", {s.hidden, s.hidden}});
    out.push_back({block + "self_attn.k_proj.weight", {kv, s.hidden}});
    out.push_back({block + "self_attn.v_proj.weight", {kv, s.hidden}});
    out.push_back({block + "self_attn.o_proj.weight", {s.hidden, s.hidden}});
    out.push_back({block + "mlp.gate_proj.weight", {s.intermediate, s.hidden}});
    out.push_back({block + "mlp.up_proj.weight", {s.intermediate, s.hidden}});
    out.push_back({block + "mlp.down_proj.weight", {s.hidden, s.intermediate}});
    out.push_back({block + "input_layernorm.weight", {s.hidden}});
    out.push_back({block + "post_attention_layernorm.weight", {s.hidden}});
  }
  return out;
}

/// A folder whose weights file is a header and a hole. Returns the parameters.
inline std::int64_t write_headers(const std::string& folder, const LlamaSizes& sizes) {
  std::filesystem::create_directories(folder);
  json header;
  std::int64_t at = 0;
  for (const auto& [name, shape] : llama_tensors(sizes)) {
    const std::int64_t bytes = 2 * checked_numel(shape, "test");
    header[name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  const std::string text = header.dump();
  const std::string path = folder + "/model.safetensors";
  {
    std::ofstream out(path, std::ios::binary);
    const std::uint64_t length = text.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << text;
  }
  std::filesystem::resize_file(path, 8 + text.size() + static_cast<std::uintmax_t>(at));
  std::ofstream(folder + "/config.json") << json{{"model_type", "llama"},
                                                 {"hidden_size", sizes.hidden},
                                                 {"num_attention_heads", sizes.heads},
                                                 {"num_key_value_heads", sizes.key_value_heads},
                                                 {"vocab_size", sizes.vocabulary},
                                                 {"tie_word_embeddings", false}};
  return at / 2;
}

}  // namespace quantal::testing

// Shapes of linear weights that follow from a model's config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quantal::checkpoint {

/// [out_features, in_features] of the modules of a llama-like model (llama, mistral, qwen2, gemma,
/// phi3 ...): q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, embed_tokens.
/// From hidden_size H, intermediate_size I, num_attention_heads A, num_key_value_heads K (default
/// A), head_dim D (default H / A) and vocab_size V.
class WeightShapes {
 public:
  /// Sizes that are absent or no positive integers are unknown. Throws Error{kCorrupt} for text
  /// that is no JSON object.
  explicit WeightShapes(const std::string& config_json);
  /// Empty if the module or a size of it is not known.
  std::vector<std::int64_t> find(const std::string& module) const;

 private:
  std::int64_t hidden_ = 0, intermediate_ = 0, query_ = 0, key_value_ = 0, vocabulary_ = 0;
};

}  // namespace quantal::checkpoint

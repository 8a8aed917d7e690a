#include "checkpoint/weight_shapes.h"

#include <string_view>

#include "checkpoint/json.h"

namespace quantal::checkpoint {
namespace {

/// Far beyond any model, and small enough that products of two cannot overflow.
constexpr std::int64_t kMostSize = std::int64_t{1} << 31;

std::int64_t size_of(const Json& config, const char* key) {
  const auto found = config.find(key);
  if (found == config.end() || !found->is_number_integer()) return 0;
  const auto value = found->get<std::int64_t>();
  return value > 0 && value < kMostSize ? value : 0;
}

}  // namespace

WeightShapes::WeightShapes(const std::string& config_json) {
  const Json config = parse_json_object(config_json, "config.json");
  hidden_ = size_of(config, "hidden_size");
  intermediate_ = size_of(config, "intermediate_size");
  vocabulary_ = size_of(config, "vocab_size");
  const std::int64_t heads = size_of(config, "num_attention_heads");
  std::int64_t key_value_heads = size_of(config, "num_key_value_heads");
  if (key_value_heads == 0) key_value_heads = heads;
  std::int64_t head_dim = size_of(config, "head_dim");
  if (head_dim == 0 && heads != 0 && hidden_ % heads == 0) head_dim = hidden_ / heads;
  query_ = heads * head_dim;
  key_value_ = key_value_heads * head_dim;
}

std::vector<std::int64_t> WeightShapes::find(const std::string& module) const {
  struct Rule {
    std::string_view name;
    std::int64_t rows, cols;
  };
  const Rule rules[] = {
      {"q_proj", query_, hidden_},
      {"k_proj", key_value_, hidden_},
      {"v_proj", key_value_, hidden_},
      {"o_proj", hidden_, query_},
      {"gate_proj", intermediate_, hidden_},
      {"up_proj", intermediate_, hidden_},
      {"down_proj", hidden_, intermediate_},
      {"lm_head", vocabulary_, hidden_},
      {"embed_tokens", vocabulary_, hidden_},
  };
  const std::size_t dot = module.rfind('.');
  const std::string_view last =
      std::string_view(module).substr(dot == std::string::npos ? 0 : dot + 1);
  for (const Rule& rule : rules) {
    if (rule.name != last) continue;
    if (rule.rows == 0 || rule.cols == 0) return {};
    return {rule.rows, rule.cols};
  }
  return {};
}

}  // namespace quantal::checkpoint

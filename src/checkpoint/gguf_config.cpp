// GGUF metadata of a llama-family model as the config.json and tokenizer facts that the Hugging
// Face world expects. Key names: docs/formats/gguf.md.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numbers>

#include "checkpoint/gguf_rope.h"
#include "checkpoint/json.h"
#include "checkpoint/sources.h"
#include "quantal/ggml.h"

namespace quantal::checkpoint {
namespace {

ErrorSite site_of(const GgufFile& file, const std::string& key) {
  return {.path = file.path(), .tensor = key};
}

[[noreturn]] void fail_type(const GgufFile& file, const std::string& key, const char* expected) {
  fail(Errc::kCorrupt, std::string("gguf: metadata has another type, expected ") + expected,
       site_of(file, key));
}

std::string text(const GgufFile& file, const std::string& key, const std::string& fallback) {
  const GgufValue* value = file.find_metadata(key);
  if (value == nullptr) return fallback;
  if (const auto* string = std::get_if<std::string>(value)) return *string;
  fail_type(file, key, "a string");
}

/// Float keys are stored as f32: the shortest decimal that reads back as the same f32 is what the
/// model's author wrote (1e-05, not 9.999999747378752e-06).
double real(const GgufFile& file, const std::string& key, double fallback) {
  const GgufValue* value = file.find_metadata(key);
  if (value == nullptr) return fallback;
  const auto* number = std::get_if<double>(value);
  if (number == nullptr || !std::isfinite(*number)) fail_type(file, key, "a finite number");
  char digits[64];
  const auto end = std::to_chars(digits, digits + sizeof digits, static_cast<float>(*number)).ptr;
  double shortest = *number;
  std::from_chars(digits, end, shortest);
  return static_cast<float>(shortest) == static_cast<float>(*number) ? shortest : *number;
}

std::int64_t positive(const GgufFile& file, const std::string& key, std::int64_t fallback) {
  const std::int64_t value = gguf_integer(file, key, fallback);
  if (value > 0) return value;
  const bool present = file.find_metadata(key) != nullptr;
  fail(Errc::kCorrupt,
       present ? "gguf: metadata is " + std::to_string(value) + ", expected above 0"
               : "gguf: metadata is missing, expected an integer above 0",
       site_of(file, key));
}

/// rope_scaling from a stored rope_freqs.weight. Throws Error{kUnsupported} unless the factors are
/// those of the llama 3 rule.
Json scaling_from_factors(const GgufTensor& tensor, double theta, std::int64_t head_dim,
                          const GgufFile& file) {
  std::vector<float> factors(static_cast<std::size_t>(
      tensor.type == static_cast<std::uint32_t>(GgmlType::kF32) ? tensor.bytes.size() / 4 : 0));
  decode_ggml(GgmlType::kF32, tensor.bytes.data(), std::ssize(factors), factors.data());
  bool match = std::ssize(factors) == head_dim / 2 && !factors.empty();
  const double factor = match ? factors.back() : 1;
  for (std::size_t i = 0; match && i < factors.size(); ++i) {
    const double exponent = 2 * static_cast<double>(i) / static_cast<double>(head_dim);
    const double wavelength = 2 * std::numbers::pi * std::pow(theta, exponent);
    const double expected = llama3_factor(wavelength, {.factor = factor});
    match = std::abs(factors[i] - expected) <= 1e-3 * expected;
  }
  if (!match) {
    fail(Errc::kUnsupported,
         "gguf: rotary frequency factors are not those of llama 3 (factor, low 1, high 4, context "
         "8192), the only ones that have a config.json",
         {.path = file.path(), .tensor = tensor.name, .offset = tensor.file_offset});
  }
  return {{"rope_type", "llama3"},
          {"factor", factor},
          {"low_freq_factor", 1.0},
          {"high_freq_factor", 4.0},
          {"original_max_position_embeddings", 8192}};
}

Json rope_scaling(const GgufFile& file, double theta, std::int64_t head_dim) {
  if (const GgufTensor* factors = file.find("rope_freqs.weight")) {
    return scaling_from_factors(*factors, theta, head_dim, file);
  }
  const std::string type = text(file, "llama.rope.scaling.type", "none");
  if (type == "none") return nullptr;
  if (type != "linear") {
    fail(Errc::kUnsupported, "gguf: rope scaling is " + type + ", expected none or linear",
         site_of(file, "llama.rope.scaling.type"));
  }
  return {{"rope_type", "linear"}, {"factor", real(file, "llama.rope.scaling.factor", 1.0)}};
}

/// The type that holds every stored value: float32 unless all matrices have one 16-bit type.
std::string torch_dtype(const GgufFile& file) {
  bool all_f16 = true, all_bf16 = true;
  for (const GgufTensor& tensor : file.tensors()) {
    if (tensor.shape.size() < 2) continue;
    all_f16 = all_f16 && tensor.type == static_cast<std::uint32_t>(GgmlType::kF16);
    all_bf16 = all_bf16 && tensor.type == static_cast<std::uint32_t>(GgmlType::kBF16);
  }
  if (all_f16 == all_bf16) return "float32";
  return all_f16 ? "float16" : "bfloat16";
}

/// An id if the key is there, else null.
Json token_id(const GgufFile& file, const std::string& key) {
  const std::int64_t id = gguf_integer(file, key, -1);
  return id < 0 ? Json(nullptr) : Json(id);
}

std::int64_t vocab_size(const GgufFile& file) {
  if (const GgufTensor* embedding = file.find("token_embd.weight")) {
    if (embedding->shape.size() == 2) return embedding->shape[0];
  }
  return positive(file, "llama.vocab_size", 0);
}

bool any_bias(const GgufFile& file, std::string_view part) {
  for (const GgufTensor& tensor : file.tensors()) {
    if (tensor.name.find(part) != std::string::npos && tensor.name.ends_with(".bias")) return true;
  }
  return false;
}

/// Blocks that have tensors: 1 + the largest N of a name "blk.N.<part>"; 0 without such names.
std::int64_t stored_blocks(const GgufFile& file) {
  constexpr std::string_view kBlock = "blk.";
  std::int64_t blocks = 0;
  for (const GgufTensor& tensor : file.tensors()) {
    if (!tensor.name.starts_with(kBlock)) continue;
    const char* end = tensor.name.data() + tensor.name.size();
    std::int32_t number = -1;
    if (std::from_chars(tensor.name.data() + kBlock.size(), end, number).ec != std::errc{})
      continue;
    blocks = std::max<std::int64_t>(blocks, std::int64_t{number} + 1);
  }
  return blocks;
}

/// Refuses a size that a tensor contradicts, before anybody builds a model of that size.
void check_claim(const GgufFile& file, const std::string& key, std::int64_t claimed,
                 std::int64_t actual, const std::string& witness) {
  if (claimed == actual) return;
  fail(Errc::kCorrupt,
       "gguf: metadata gives " + std::to_string(claimed) + ", expected " + std::to_string(actual) +
           " as " + witness,
       site_of(file, key));
}

void check_claims(const GgufFile& file, const Json& config) {
  const auto claim = [&config](const char* name) { return config.at(name).get<std::int64_t>(); };
  const auto check_rows = [&file](const char* tensor, const char* key, std::int64_t claimed) {
    const GgufTensor* found = file.find(tensor);
    if (found == nullptr || found->shape.empty()) return;
    check_claim(file, key, claimed, found->shape[0], std::string("rows of ") + tensor);
  };
  if (const std::int64_t blocks = stored_blocks(file); blocks > 0) {
    check_claim(file, "llama.block_count", claim("num_hidden_layers"), blocks,
                "blocks that have tensors");
  }
  check_rows("output_norm.weight", "llama.embedding_length", claim("hidden_size"));
  check_rows("blk.0.ffn_up.weight", "llama.feed_forward_length", claim("intermediate_size"));
  check_rows("blk.0.attn_q.weight", "llama.attention.head_count",
             claim("num_attention_heads") * claim("head_dim"));
  check_rows("blk.0.attn_k.weight", "llama.attention.head_count_kv",
             claim("num_key_value_heads") * claim("head_dim"));
}

Json plain_json(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> Json {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, std::shared_ptr<GgufArray>>) {
          Json list = Json::array();
          for (const GgufValue& element : v->values) list.push_back(plain_json(element));
          return list;
        } else {
          return v;
        }
      },
      value);
}

}  // namespace

std::int64_t gguf_integer(const GgufFile& file, const std::string& key, std::int64_t fallback) {
  const GgufValue* value = file.find_metadata(key);
  if (value == nullptr) return fallback;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (const auto* number = std::get_if<std::uint64_t>(value)) {
    if (*number <= static_cast<std::uint64_t>(kMost)) return static_cast<std::int64_t>(*number);
  } else if (const auto* with_sign = std::get_if<std::int64_t>(value)) {
    if (*with_sign >= 0 && *with_sign <= kMost) return *with_sign;
  } else {
    fail_type(file, key, "an integer");
  }
  fail(Errc::kCorrupt, "gguf: metadata is out of range, expected 0 to 2^31 - 1",
       site_of(file, key));
}

std::string gguf_config_json(const GgufFile& file) {
  const std::string architecture = text(file, "general.architecture", "(none)");
  if (architecture != "llama") {
    fail(Errc::kUnsupported, "gguf: architecture is \"" + architecture + "\", expected \"llama\"",
         site_of(file, "general.architecture"));
  }
  const std::int64_t hidden = positive(file, "llama.embedding_length", 0);
  const std::int64_t heads = positive(file, "llama.attention.head_count", 0);
  const std::int64_t head_dim =
      positive(file, "llama.attention.key_length",
               gguf_integer(file, "llama.rope.dimension_count", hidden / heads));
  const double theta = real(file, "llama.rope.freq_base", 10000.0);
  Json config;
  config["architectures"] = {"LlamaForCausalLM"};
  config["model_type"] = "llama";
  config["hidden_size"] = hidden;
  config["intermediate_size"] = positive(file, "llama.feed_forward_length", 0);
  config["num_hidden_layers"] = positive(file, "llama.block_count", 0);
  config["num_attention_heads"] = heads;
  config["num_key_value_heads"] = positive(file, "llama.attention.head_count_kv", heads);
  config["head_dim"] = head_dim;
  config["hidden_act"] = "silu";
  config["rms_norm_eps"] = real(file, "llama.attention.layer_norm_rms_epsilon", 1e-5);
  config["rope_theta"] = theta;
  config["rope_scaling"] = rope_scaling(file, theta, head_dim);
  config["max_position_embeddings"] = positive(file, "llama.context_length", 2048);
  config["vocab_size"] = vocab_size(file);
  config["tie_word_embeddings"] = file.find("output.weight") == nullptr;
  config["attention_bias"] = any_bias(file, ".attn_");
  config["mlp_bias"] = any_bias(file, ".ffn_");
  config["bos_token_id"] = token_id(file, "tokenizer.ggml.bos_token_id");
  config["eos_token_id"] = token_id(file, "tokenizer.ggml.eos_token_id");
  config["pad_token_id"] = token_id(file, "tokenizer.ggml.padding_token_id");
  config["torch_dtype"] = torch_dtype(file);
  check_claims(file, config);
  return dump_json(config);
}

std::string gguf_tokenizer_json(const GgufFile& file) {
  constexpr std::string_view kPrefix = "tokenizer.ggml.";
  Json out = Json::object();
  for (const auto& [key, value] : file.metadata()) {
    if (key.starts_with(kPrefix)) out[key.substr(kPrefix.size())] = plain_json(value);
    if (key == "tokenizer.chat_template") out["chat_template"] = plain_json(value);
  }
  return dump_json(out, -1);
}

}  // namespace quantal::checkpoint

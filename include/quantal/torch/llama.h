// A Llama-family causal language model over quantal::Linear: grouped-query attention, rotary
// positions, RMSNorm, SwiGLU, tied embeddings. Module names are Hugging Face's.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "quantal/checkpoint.h"
#include "quantal/torch/adapter.h"
#include "quantal/torch/embedding.h"
#include "quantal/torch/linear.h"

namespace quantal {

/// The members of a Llama config.json that decide the arithmetic; same names.
struct LlamaConfig {
  std::int64_t vocab_size = 0;                  ///< rows of the embedding
  std::int64_t hidden_size = 0;                 ///< width of the residual stream
  std::int64_t intermediate_size = 0;           ///< width inside an MLP
  std::int64_t num_hidden_layers = 0;           ///< blocks
  std::int64_t num_attention_heads = 0;         ///< of queries
  std::int64_t num_key_value_heads = 0;         ///< of keys and values
  std::int64_t head_dim = 0;                    ///< width of a head
  std::int64_t max_position_embeddings = 2048;  ///< longest sequence
  double rms_norm_eps = 1e-6;                   ///< added to the mean square
  double rope_theta = 10000;                    ///< base of the rotation angles
  bool tie_word_embeddings = false;             ///< the head is the embedding
  bool attention_bias = false;                  ///< biases of q, k, v, o
  bool mlp_bias = false;                        ///< biases of gate, up, down
  std::vector<std::int64_t> eos_token_ids;      ///< that end a generated text
  std::string json = "{}";                      ///< the text it came from

  /// Throws Error{kConfig} for missing or contradicting sizes, Error{kUnsupported} for another
  /// model_type, activation or kind of rope scaling.
  static LlamaConfig from_json(const std::string& json);
};

/// Keys and values of the tokens seen so far, one pair [batch, kv_heads, capacity, head_dim] per
/// layer; owned by the caller, made by LlamaImpl::make_cache.
struct KvCache {
  std::vector<torch::Tensor> keys;    ///< by layer
  std::vector<torch::Tensor> values;  ///< by layer
  std::int64_t length = 0;            ///< positions that are filled
};

/// Of LlamaImpl::generate.
struct GenerateOptions {
  std::int64_t max_new_tokens = 32;  ///< at most
  double temperature = 0;            ///< 0 = greedy
  std::uint64_t seed = 0;            ///< of the sampler, used where temperature > 0
};

class LlamaBlockImpl;
class LlamaModelImpl;

/// Logits over the vocabulary. Children `model` (embed_tokens, layers, norm) and, unless tied,
/// `lm_head`.
class LlamaImpl : public torch::nn::Module {
 public:
  /// Values are undefined until they are loaded or initialize() is called.
  explicit LlamaImpl(LlamaConfig config, torch::ScalarType dtype = torch::kFloat);

  /// ids int64 [batch, length] -> logits [batch, length, vocab]. Throws Error{kShape} for ids
  /// outside the vocabulary or more positions than max_position_embeddings.
  torch::Tensor forward(const torch::Tensor& ids);
  /// The same for the positions after those in `cache`, which is extended; logits of the last
  /// position only, [batch, vocab].
  torch::Tensor step(const torch::Tensor& ids, KvCache& cache);
  /// An empty cache for so many sequences and positions.
  KvCache make_cache(std::int64_t batch, std::int64_t capacity) const;

  /// Mean negative log likelihood (nats) of tokens 1 .. length-1 of each row, each predicted from
  /// the tokens before it in its row; float32.
  torch::Tensor loss(const torch::Tensor& ids);
  /// exp of the mean over all predicted tokens of all rows of `ids` [n, length], a few rows at a
  /// time without gradients. Throws Error{kShape} for fewer than two columns or no rows.
  double perplexity(const torch::Tensor& ids, std::int64_t rows_at_a_time = 2);
  /// New tokens only, ending after the first end-of-text token. `ids` int64 [length].
  std::vector<std::int64_t> generate(const torch::Tensor& ids, const GenerateOptions& options);

  /// Normal(0, 0.02) weights from `seed`, norms 1, as a fresh Llama has.
  void initialize(std::uint64_t seed);
  /// Recompute each block in backward instead of keeping its activations; same gradients.
  void set_gradient_checkpointing(bool on) { checkpointing_ = on; }
  const LlamaConfig& config() const { return config_; }  ///< what it was built from
  /// Tensors that files may have beside the one they are: {"lm_head.weight":
  /// "model.embed_tokens.weight"} if the embedding is tied.
  std::map<std::string, std::string> tied_tensors() const;
  Embedding embed_tokens() const;  ///< the table of token embeddings

  std::shared_ptr<LlamaModelImpl> model;  ///< embedding, blocks and final norm
  Linear lm_head{nullptr};                ///< empty if the embedding is tied

 private:
  void check_ids(const torch::Tensor& ids, std::int64_t past) const;
  torch::Tensor hidden(const torch::Tensor& ids, KvCache* cache);
  torch::Tensor logits(const torch::Tensor& hidden_states);

  LlamaConfig config_;
  bool checkpointing_ = false;
};
/// Holder of a LlamaImpl.
TORCH_MODULE(Llama);

/// Builds a Llama from a GGUF file, a safetensors file or a Hugging Face folder, decoded to `dtype`
/// (f32 or bf16). Throws what ModelSource throws; Error{kCorrupt} listing missing and misshapen
/// tensors.
Llama load_llama(const std::string& path, torch::ScalarType dtype = torch::kFloat);

/// Builds a Llama from the config of a folder or file and fills it with
/// adapter.load_quantized_model: what is packed there stays packed (GGUF too), so memory never
/// holds its dense weights. `loaded`, where given, receives what a save needs. Throws what
/// load_quantized_model throws.
Llama load_quantized_llama(const std::string& path, QuantizationAdapter& adapter,
                           LoadedModel* loaded = nullptr);

}  // namespace quantal

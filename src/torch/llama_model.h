// The decoder stack of a Llama: embedding, blocks, final norm.
#pragma once

#include <torch/torch.h>

#include <memory>

#include "quantal/torch/llama.h"

namespace quantal {

/// Rotation angles of some positions, [length, head_dim]: cos, and sin with a minus in the first
/// half, computed in float32.
struct Rotary {
  torch::Tensor cos, sin;
};
/// Angle of dimension i and i + head_dim / 2 at position p: p * theta^(-2 i / head_dim).
Rotary rotary_angles(const LlamaConfig& config, std::int64_t first, std::int64_t length,
                     torch::ScalarType dtype);

/// y = weight * dtype(x / sqrt(mean(x^2) + eps)), the mean over the last dimension in float32; y
/// has the dtype of x whatever that of the weight.
class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(std::int64_t size, double eps, torch::ScalarType dtype);
  torch::Tensor forward(const torch::Tensor& x);

  torch::Tensor weight;

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

/// Grouped-query attention with rotary positions.
class LlamaAttentionImpl : public torch::nn::Module {
 public:
  LlamaAttentionImpl(const LlamaConfig& config, torch::ScalarType dtype);
  /// x [batch, length, hidden]. With a cache, keys and values of layer `index` are appended.
  torch::Tensor forward(const torch::Tensor& x, const Rotary& rotary, KvCache* cache,
                        std::size_t index);

  Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};

 private:
  std::int64_t heads_, kv_heads_, head_dim_;
};
TORCH_MODULE(LlamaAttention);

/// down(silu(gate(x)) * up(x)).
class LlamaMlpImpl : public torch::nn::Module {
 public:
  LlamaMlpImpl(const LlamaConfig& config, torch::ScalarType dtype);
  torch::Tensor forward(const torch::Tensor& x);

  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
};
TORCH_MODULE(LlamaMlp);

/// One decoder block with its two residual additions.
class LlamaBlockImpl : public torch::nn::Module {
 public:
  LlamaBlockImpl(const LlamaConfig& config, torch::ScalarType dtype);
  torch::Tensor forward(const torch::Tensor& x, const Rotary& rotary, KvCache* cache,
                        std::size_t index);

  RmsNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
  LlamaAttention self_attn{nullptr};
  LlamaMlp mlp{nullptr};
};
TORCH_MODULE(LlamaBlock);

class LlamaModelImpl : public torch::nn::Module {
 public:
  LlamaModelImpl(const LlamaConfig& config, torch::ScalarType dtype);
  /// ids [batch, length] -> hidden states after the final norm. `recompute` as in
  /// LlamaImpl::set_gradient_checkpointing; it has an effect only where gradients are recorded.
  torch::Tensor forward(const torch::Tensor& ids, KvCache* cache, bool recompute);

  Embedding embed_tokens{nullptr};
  torch::nn::ModuleList layers;
  RmsNorm norm{nullptr};

 private:
  LlamaConfig config_;
};

}  // namespace quantal

// Attention of torch tensors by quantal's kernels where they are faster, else by torch's own.
#pragma once

#include <torch/types.h>

#include <optional>

#include "quantal/attention_choice.h"

namespace quantal {

/// Of attention().
struct AttentionOptions {
  bool causal = false;            ///< query i sees keys 0 .. keys - queries + i, else all
  std::optional<double> scale{};  ///< of the scores; unset: 1 / sqrt(dim)
  /// Undefined, or what torch's attn_mask may be, broadcast to [batch, heads, queries, keys]: bool,
  /// true where a key is seen, or numbers that are added to the scores.
  torch::Tensor mask{};
};

/// `softmax(scale q k^T) v` over the keys that a query sees, [batch, heads, queries, dim].
///
/// q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim], of one dtype and device;
/// head h reads the keys of head `h / (heads / kv_heads)`. By quantal's kernels where the tensors
/// are on the CPU, attention_refusal is empty and the mask, if any, is bool, the same for all heads
/// and one run of keys for each query, as those of padding, packed sequences and windows are (the
/// result then lies in memory as [batch, queries, heads, dim]); else by
/// torch::scaled_dot_product_attention. Autocast casts as it does for that. Differentiable once in
/// q, k and v (Error{kUnsupported} for twice); keeps q, k, v, the result and a float32 per query.
/// Throws Error{kShape}, Error{kDtype}, Error{kDevice}, and what torch throws for its masks.
torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionOptions& options = {});

}  // namespace quantal

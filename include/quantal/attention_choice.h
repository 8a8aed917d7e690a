// quantal attention_choice: whether quantal's attention or the framework's runs, decided here for
// every face. Part of the room policy.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "quantal/attention.h"

namespace quantal {

/// The sizes of an attention of tensors q [batch, heads, queries, dim] and k, v [batch, kv_heads,
/// keys, dim]. Throws Error{kShape} for sizes that differ where they must not; attention_refusal
/// checks the rest.
AttentionShape attention_shape(std::span<const std::int64_t> q, std::span<const std::int64_t> k,
                               std::span<const std::int64_t> v, bool causal, double scale);

/// What a model does with its attention.
enum class AttentionUse {
  kInference,  ///< reads texts and generates, without gradients
  kTraining    ///< many positions, with gradients
};

/// Why a model with such heads has nothing from quantal's attention, so that it had better keep the
/// framework's: attention_refusal of what it does most; empty if it is faster with it. The rule
/// behind attn_implementation="auto".
std::string attention_gain_refusal(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                                   DType dtype, AttentionUse use);

}  // namespace quantal

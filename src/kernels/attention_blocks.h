// Attention of many rows: what quantal/attention.h promises, cut into blocks of rows for the
// kernels of the active set.
#pragma once

#include "kernels/cpu/attention_kernels.h"
#include "quantal/attention.h"

namespace quantal {

/// Heads that share a head of keys and values.
inline std::int64_t group_of(const AttentionShape& shape) { return shape.heads / shape.kv_heads; }

/// The problem of one head of keys and values: `index` is sequence * kv_heads + head. lse may be
/// null.
AttentionJob attention_job(const AttentionShape& shape, std::int64_t index, const AttentionInput& q,
                           const AttentionInput& k, const AttentionInput& v,
                           const AttentionOutput& out, float* lse, std::int64_t element_bytes);

/// attention and attention_backward by the kernels of many rows, for checked arguments.
void attention_blocks(const BlockAttention& kernels, const AttentionShape& shape,
                      const AttentionInput& q, const AttentionInput& k, const AttentionInput& v,
                      const AttentionOutput& out, float* lse, const Executor& executor);
void attention_blocks_backward(const BlockAttention& kernels, const AttentionShape& shape,
                               const AttentionSaved& saved, const AttentionGradients& gradients,
                               const Executor& executor);

}  // namespace quantal

// quantal attention: softmax(q k^T) v and its gradients where the framework's own are slow, which
// is bfloat16 on processors with AVX512_BF16 and without AMX, and one position at a time on all.
#pragma once

#include <cstdint>
#include <string>

#include "quantal/core.h"

namespace quantal {

/// Sizes of an attention, and which keys are seen: q [batch, heads, queries, dim], k and v [batch,
/// kv_heads, keys, dim]. Head h reads the keys and values of head `h / (heads / kv_heads)`
/// (grouped-query attention).
struct AttentionShape {
  std::int64_t batch = 0;     ///< independent sequences
  std::int64_t heads = 0;     ///< of q, a multiple of kv_heads
  std::int64_t kv_heads = 0;  ///< of k and v
  std::int64_t queries = 0;   ///< positions of q, the last of those of k
  std::int64_t keys = 0;      ///< positions of k and v
  std::int64_t dim = 0;       ///< values of a head
  bool causal = false;        ///< query i sees keys 0 .. keys - queries + i, else all
  float scale = 0;            ///< of the scores, usually 1 / sqrt(dim)
  /// int32 [batch, queries] each, or null: query i of a sequence sees keys [run_begin[i],
  /// run_end[i]) and no others; causal is false then. Padding, packed sequences and windows are
  /// such runs. A query without keys has 0 for its result and gradients, -infinity for its lse.
  const std::int32_t* run_begin = nullptr;
  const std::int32_t* run_end = nullptr;  ///< with run_begin
};

/// The runs of a mask [rows, keys], a byte per key, not 0 where it is seen; `stride` bytes from row
/// to row. Returns false, with begin and end unspecified, if a row sees keys that are no single
/// run.
bool runs_of_mask(const std::uint8_t* mask, std::int64_t rows, std::int64_t keys,
                  std::int64_t stride, std::int32_t* begin, std::int32_t* end) noexcept;

/// Elements of [batch, heads, positions, dim] from one index to the next; the last axis is dense.
struct AttentionStrides {
  std::int64_t batch = 0;     ///< to the next sequence
  std::int64_t head = 0;      ///< to the next head
  std::int64_t position = 0;  ///< to the next position
};
/// A tensor that is read.
struct AttentionInput {
  const void* data = nullptr;  ///< element 0
  AttentionStrides strides;    ///< of data
};
/// A tensor that is written.
struct AttentionOutput {
  void* data = nullptr;      ///< element 0
  AttentionStrides strides;  ///< of data
};

/// Why the kernels of the active set do not take this, as "what is <actual>, expected <allowed>";
/// empty if they do. `with_gradient`: attention_backward is wanted too. A refusal is about speed or
/// missing kernels; the framework's own attention is the alternative. Throws Error{kShape} as
/// attention.
std::string attention_refusal(const AttentionShape& shape, DType dtype, bool with_gradient);

/// `out[i] = sum_j p[i, j] v[j]`, `p[i, j] = exp(s[i, j] - lse[i])`, `s[i, j] = scale sum q[i]
/// k[j]`, `lse[i] = log sum_j exp(s[i, j])` over the keys that query i sees. q, k, v and out have
/// `dtype`; lse float32 [batch, heads, queries], null where not wanted. Scores and sums are
/// float32; where the rows are many, p is rounded to bfloat16 before the second product, as in the
/// framework's, and a value that is not finite may reach queries near those that see it. Bits
/// depend on nothing but the shape and the kernel set. Throws Error{kUnsupported} with
/// attention_refusal, Error{kShape} for negative sizes, heads that kv_heads does not divide, no
/// keys, if causal fewer keys than queries, or runs beyond the keys.
void attention(const AttentionShape& shape, DType dtype, const AttentionInput& q,
               const AttentionInput& k, const AttentionInput& v, const AttentionOutput& out,
               float* lse, const Executor& executor);

/// What attention computed, and the gradient of its result.
struct AttentionSaved {
  AttentionInput q;            ///< input of attention
  AttentionInput k;            ///< input of attention
  AttentionInput v;            ///< input of attention
  AttentionInput out;          ///< its result
  const float* lse = nullptr;  ///< [batch, heads, queries] of it
  AttentionInput grad;         ///< of the result
};
/// What attention_backward gives.
struct AttentionGradients {
  AttentionOutput q;  ///< of q, in its shape
  AttentionOutput k;  ///< of k, in its shape
  AttentionOutput v;  ///< of v, in its shape
};

/// Gradients of attention: `dv[j] = sum_i p[i, j] g[i]`, `ds[i, j] = p[i, j] (g[i] v[j] - g[i]
/// out[i])`, `dq[i] = scale sum_j ds[i, j] k[j]`, `dk[j] = scale sum_i ds[i, j] q[i]`, heads that
/// share keys summed. p is computed again; p and ds are rounded to bfloat16 before they are
/// multiplied. Dtypes, determinism and errors as attention.
void attention_backward(const AttentionShape& shape, DType dtype, const AttentionSaved& saved,
                        const AttentionGradients& gradients, const Executor& executor);

}  // namespace quantal

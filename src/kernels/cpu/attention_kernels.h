// Attention (quantal/attention.h) across the line between the dispatcher and the files of one
// instruction set. Only <cstdint> may be included here.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"

namespace quantal {

// One head of keys and values is read by `group` heads of queries. Their queries are the *rows* of
// one problem, row = query * group + head, so that keys are read once for all and the number of
// keys that a row sees, `first_seen + row / group` (at most `keys`), does not fall.

/// Rows of q, out, ... of one problem: row r begins at data + r / group * position + r % group *
/// head elements.
struct AttentionRows {
  void* data;
  std::int64_t position, head;
};

/// One problem: the queries of one head of keys and values.
struct AttentionJob {
  AttentionRows q;  ///< only read
  const void* k;    ///< key j begins at k + j * k_stride elements
  const void* v;    ///< value j at v + j * v_stride
  std::int64_t k_stride, v_stride;
  AttentionRows out;
  float* lse;  ///< of row r at lse + r / group + r % group * lse_head; null: not wanted
  std::int64_t lse_head;
  std::int64_t group, rows, keys, dim;
  const std::int32_t* begin;  ///< row r sees keys [begin[r / group], end[r / group])
  const std::int32_t* end;
  float scale;
};

/// Few rows, most of all one position of a model that generates. Keys are cut into chunks; what a
/// chunk makes of every row is a *part*: [rows, dim] of sum_j exp(s[j] - most) v[j], then `most`,
/// the largest score s[j], of kRows rows, then sum_j exp(s[j] - most) of kRows rows, all float32.
struct FewRowsAttention {
  /// Most rows and largest dim of a job; dim is a multiple of 16. Most keys of a chunk.
  static constexpr std::int64_t kRows = 16, kMaxDim = 256, kKeys = 1024;
  /// float32 that `part` works in, the calling thread's own: queries as float32, and scores.
  static constexpr std::int64_t kScratchFloats = kRows * (kMaxDim + kKeys);
  static constexpr std::int64_t part_floats(std::int64_t rows, std::int64_t dim) {
    return rows * dim + 2 * kRows;
  }
  /// The part of keys [begin, end).
  void (*part)(const AttentionJob& job, FloatKind kind, std::int64_t begin, std::int64_t end,
               float* scratch, float* part) noexcept;
  /// out and lse from the parts of all keys in their order, part_floats from one to the next.
  void (*finish)(const AttentionJob& job, FloatKind kind, const float* parts,
                 std::int64_t count) noexcept;
};

/// What attention computed for the rows of a job, and where gradients go.
struct AttentionGradJob {
  AttentionJob job;    ///< out only read, lse not null
  AttentionRows grad;  ///< of out, only read
  AttentionRows dq;
  float* dk;  ///< [keys, dim], added to
  float* dv;
};

/// Many rows of bfloat16, dim a multiple of 16.
struct BlockAttention {
  /// Rows of one call; `row` is a multiple of it.
  static constexpr std::int64_t kRows = 64;
  static constexpr std::int64_t kMaxDim = 256;
  /// float32 that a call works in, the calling thread's own, whole cache lines.
  static constexpr std::int64_t scratch_floats(std::int64_t dim) { return 4 * kRows * dim; }
  /// out and lse of rows [row, row + rows).
  void (*forward)(const AttentionJob& job, std::int64_t row, std::int64_t rows,
                  float* scratch) noexcept;
  /// dq of rows [row, row + rows) and what they add to dk and dv, without `scale` in dk.
  void (*backward)(const AttentionGradJob& job, std::int64_t row, std::int64_t rows,
                   float* scratch) noexcept;
  /// out[i] = scale * (the sum of sums[part * stride + i] in the order of parts), n a multiple of
  /// 16.
  void (*round)(const float* sums, std::int64_t parts, std::int64_t stride, float scale,
                std::int64_t n, std::uint16_t* out) noexcept;
};
const BlockAttention& block_attention_avx512bf16();
void attention_backward_avx512bf16(const AttentionGradJob& job, std::int64_t row, std::int64_t rows,
                                   float* scratch) noexcept;

const FewRowsAttention& few_rows_attention_scalar();
const FewRowsAttention& few_rows_attention_avx2();
const FewRowsAttention& few_rows_attention_avx512();
const FewRowsAttention& few_rows_attention_neon();

}  // namespace quantal

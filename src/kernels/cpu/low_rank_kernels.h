// Products with matrices of low rank (quantal/low_rank.h) across the line between the dispatcher
// and the files of one instruction set. Only <cstdint> may be included here.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"

namespace quantal {

/// x and y are rows of n elements of a FloatKind, p is float32 [rank, n], t float32 [rows, rank].
struct LowRankKernels {
  /// Rows that tasks are cut at multiples of, and columns.
  static constexpr std::int64_t kRows = 48, kColumns = 64;

  /// t[m, r] = scale * sum_n x[m, n] p[r, n]: by lanes in the order of n, then the lanes.
  void (*reduce)(FloatKind kind, const void* x, std::int64_t rows, std::int64_t n, const float* p,
                 std::int64_t rank, float scale, float* t) noexcept;
  /// y[m, n] += sum_r t[m, r] p[r, n], in the order of r, rounded once.
  void (*expand)(FloatKind kind, const float* t, std::int64_t rows, std::int64_t rank,
                 const float* p, std::int64_t n, void* y) noexcept;
  /// sums[r, c] = sum_m t[m, r] x[m, c] for columns [begin, end), in the order of m; begin is a
  /// multiple of kColumns.
  void (*outer)(FloatKind kind, const float* t, std::int64_t rows, std::int64_t rank, const void* x,
                std::int64_t n, std::int64_t begin, std::int64_t end, float* sums) noexcept;
};

const LowRankKernels& low_rank_kernels_scalar();
const LowRankKernels& low_rank_kernels_avx2();
const LowRankKernels& low_rank_kernels_avx512();
const LowRankKernels& low_rank_kernels_neon();

}  // namespace quantal

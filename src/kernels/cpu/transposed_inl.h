// The product of the backward pass straight from packed codes (quantal/kernels.h,
// matmul_transposed).
//
// Defined order of a sum: rows in order with fma, from zero in each block of block_rows(w) rows;
// block sums are added in order.
#pragma once

#include "kernels/cpu/matmul_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Columns of one tile and rows decoded at a time (32 KiB of float32).
constexpr std::int64_t kTileColumns = 512;
constexpr std::int64_t kTileDecodeRows = 16;
static_assert(kTileColumns == kDecodeColumns);
static_assert(kTransposedBlockRows % kTileDecodeRows == 0);
static_assert(kTransposedBigBlockRows % kTileDecodeRows == 0);

inline std::int64_t block_rows(const KernelMatrix& w) {
  return w.rows > kTransposedManyRows ? kTransposedBigBlockRows : kTransposedBlockRows;
}

/// acc[m][c] += sum over n of g[m, n] decoded[n][c], for 16 kVectors columns.
template <class T, int kInputs, int kVectors>
void add_rows(const float* decoded, const float* g, std::int64_t ldg, std::int64_t rows,
              float* acc) {
  using F = typename T::F;
  F sums[kInputs][kVectors];
  for (int m = 0; m < kInputs; ++m) {
    for (int v = 0; v < kVectors; ++v) sums[m][v] = T::load(acc + m * kTileColumns + v * kLanes);
  }
  for (std::int64_t n = 0; n < rows; ++n) {
    F values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = T::load(decoded + n * kTileColumns + v * kLanes);
    for (int m = 0; m < kInputs; ++m) {
      const F input = T::set1(g[m * ldg + n]);
      for (int v = 0; v < kVectors; ++v) sums[m][v] = T::fma(values[v], input, sums[m][v]);
    }
  }
  for (int m = 0; m < kInputs; ++m) {
    for (int v = 0; v < kVectors; ++v) T::store(acc + m * kTileColumns + v * kLanes, sums[m][v]);
  }
}

template <class T, int kInputs>
void add_rows_all_columns(const float* decoded, const float* g, std::int64_t ldg, std::int64_t rows,
                          std::int64_t padded, float* acc) {
  std::int64_t c = 0;
  for (; c + 2 * kLanes <= padded; c += 2 * kLanes) {
    add_rows<T, kInputs, 2>(decoded + c, g, ldg, rows, acc + c);
  }
  if (c < padded) add_rows<T, kInputs, 1>(decoded + c, g, ldg, rows, acc + c);
}

template <class T>
void flush(float* acc, float* totals, int inputs, std::int64_t padded) {
  for (int m = 0; m < inputs; ++m) {
    for (std::int64_t c = m * kTileColumns; c < m * kTileColumns + padded; c += kLanes) {
      T::store(totals + c, T::add(T::load(totals + c), T::load(acc + c)));
      T::store(acc + c, T::zero());
    }
  }
}

/// Columns [col, col + count), count <= kTileColumns, for all rows and inputs.
template <class T>
void transposed_tile(const KernelMatrix& w, DecodeRow decode, const TransposedJob& job,
                     std::int64_t col, std::int64_t count) {
  constexpr int kInputs = T::kTileInputs == 1 ? 2 : T::kTileInputs;
  const std::int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  alignas(64) float decoded[kTileDecodeRows * kTileColumns];
  alignas(64) float acc[kMaxInputRows * kTileColumns];
  alignas(64) float totals[kMaxInputRows * kTileColumns];
  for (std::int64_t i = 0; i < job.inputs * kTileColumns; i += kLanes) {
    T::store(acc + i, T::zero());
    T::store(totals + i, T::zero());
  }
  for (std::int64_t n = 0; n < w.rows; n += kTileDecodeRows) {
    if (n != 0 && n % block_rows(w) == 0) flush<T>(acc, totals, job.inputs, padded);
    const std::int64_t rows = min64(kTileDecodeRows, w.rows - n);
    for (std::int64_t r = 0; r < rows; ++r) {
      decode(w, n + r, col, count, decoded + r * kTileColumns);
    }
    int m = 0;
    for (; m + kInputs <= job.inputs; m += kInputs) {
      add_rows_all_columns<T, kInputs>(decoded, job.g + m * job.ldg + n, job.ldg, rows, padded,
                                       acc + m * kTileColumns);
    }
    for (; m < job.inputs; ++m) {
      add_rows_all_columns<T, 1>(decoded, job.g + m * job.ldg + n, job.ldg, rows, padded,
                                 acc + m * kTileColumns);
    }
  }
  flush<T>(acc, totals, job.inputs, padded);
  auto* y = static_cast<std::uint8_t*>(job.y);
  const std::int64_t bytes = job.y_kind == FloatKind::kF32 ? 4 : 2;
  for (int m = 0; m < job.inputs; ++m) {
    for (std::int64_t c = 0; c < count; c += kLanes) {
      store_kind_n<T>(job.y_kind, T::load(totals + m * kTileColumns + c),
                      y + (m * job.ldy + col + c) * bytes, min64(kLanes, count - c));
    }
  }
}

template <class T>
void matmul_transposed_kernel(const KernelMatrix& w, DecodeRow decode, const TransposedJob& job,
                              std::int64_t col_begin, std::int64_t col_end) {
  for (std::int64_t c = col_begin; c < col_end; c += kTileColumns) {
    transposed_tile<T>(w, decode, job, c, min64(kTileColumns, col_end - c));
  }
}

}  // namespace
}  // namespace quantal

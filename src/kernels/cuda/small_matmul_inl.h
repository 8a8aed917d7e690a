// y = x w^T for up to 16 rows of x, straight from packed codes.
//
// Weights are the 16 x 16 operand of the tensor cores, activations its 16 x 8 partner, so that a
// weight is decoded once for up to 8 rows of x and float32 sums cost nothing. The order of columns
// inside a product is free as long as both operands agree: lane (g, t) of a warp takes 32
// consecutive columns (a pair: at 4 bits one strip, one load of 16 bytes) of rows g and g + 8, four
// columns per product, and the same columns of row g of x. The warps of a block share the columns
// of its rows; their sums are added in order, so results depend on nothing but the shapes.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/table_inl.h"

namespace quantal::cuda {

inline constexpr int kSmallThreads = 256;
inline constexpr int kSmallWarps = kSmallThreads / kWarp;

/// kRowTiles x 16 rows of weights per block, kInputTiles x 8 rows of x.
template <int kRowTiles, int kInputTiles>
struct SmallShape {
  static constexpr int kRows = 16 * kRowTiles, kInputs = 8 * kInputTiles;
  static constexpr int kSums = kRowTiles * kInputTiles * kWarp * 4;  // of a warp

  static Geometry geometry(std::int64_t rows) {
    return {.blocks_x = (rows + kRows - 1) / kRows,
            .threads = kSmallThreads,
            .shared_bytes = kTableBytes + kSmallWarps * kSums * 4};
  }
};

/// A row's packed codes and statistics; rows beyond the matrix read the last one.
struct SmallRow {
  const std::uint8_t* codes;
  RowStart start;
};
QUANTAL_DEVICE SmallRow small_row(const Matrix& w, std::int64_t row) {
  const std::int64_t r = row < w.rows ? row : w.rows - 1;
  return {w.codes + r * w.code_bytes, row_start(w, r)};
}

/// 16 columns of row `m` of x from `col` on, zeros where there are none.
QUANTAL_DEVICE void load_inputs(const SmallArgs& a, int m, std::uint32_t col, bool inside,
                                std::uint32_t out[8]) {
  Words4 low{}, high{};
  if (inside && m < a.inputs) {
    const auto* at = reinterpret_cast<const std::uint8_t*>(a.x + m * a.w.cols + col);
    low = load_words(at);
    high = load_words(at + 16);
  }
  QUANTAL_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[i] = low.w[i];
    out[4 + i] = high.w[i];
  }
}

/// The strips of one step for all rows of a lane.
template <int kRowTiles>
struct SmallRaw {
  RawPair rows[kRowTiles][2];
};
template <int kBits, int kRowTiles>
QUANTAL_DEVICE SmallRaw<kRowTiles> load_step(const Matrix& w, const SmallRow rows[kRowTiles][2],
                                             std::uint32_t pair, bool inside) {
  SmallRaw<kRowTiles> raw{};
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (inside) raw.rows[i][h] = load_pair<kBits>(rows[i][h].codes, w.code_bytes, pair);
    }
  }
  return raw;
}

/// Weights of a chunk of one row as 16-bit elements, zeros outside of the matrix.
template <int kBits, Values kValues, FloatKind kKind>
QUANTAL_DEVICE void decode_weights(const Matrix& w, Table table, const SmallRow& row,
                                   const RawPair& raw, std::uint32_t pair, std::uint32_t second,
                                   bool inside, std::uint32_t out[8]) {
  float v[kChunk] = {};
  if (inside) decode_chunk<kBits, kValues>(w, table, row.start, raw, pair, second, v);
  pack_chunk<kKind>(v, out);
}

/// Adds the products of one chunk of columns.
template <int kBits, Values kValues, FloatKind kKind, int kRowTiles, int kInputTiles>
QUANTAL_DEVICE void multiply_chunk(const SmallArgs& a, Table table,
                                   const SmallRow rows[kRowTiles][2],
                                   const SmallRaw<kRowTiles>& raw, std::uint32_t pair,
                                   std::uint32_t second, float sums[kRowTiles][kInputTiles][4]) {
  const std::uint32_t col = (2 * pair + second) * kChunk;
  const bool inside = col < a.w.cols;
  std::uint32_t x[kInputTiles][8];
  QUANTAL_UNROLL
  for (int j = 0; j < kInputTiles; ++j) {
    load_inputs(a, 8 * j + thread_index() % kWarp / 4, col, inside, x[j]);
  }
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    std::uint32_t low[8], high[8];  // rows g and g + 8
    decode_weights<kBits, kValues, kKind>(a.w, table, rows[i][0], raw.rows[i][0], pair, second,
                                          inside, low);
    decode_weights<kBits, kValues, kKind>(a.w, table, rows[i][1], raw.rows[i][1], pair, second,
                                          inside, high);
    QUANTAL_UNROLL
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t operand[4] = {low[2 * k], high[2 * k], low[2 * k + 1], high[2 * k + 1]};
      QUANTAL_UNROLL
      for (int j = 0; j < kInputTiles; ++j) multiply<kKind>(sums[i][j], operand, x[j] + 2 * k);
    }
  }
}

/// Adds the sums of the warps in order and writes y.
template <FloatKind kKind, int kRowTiles, int kInputTiles>
QUANTAL_DEVICE void store_sums(const SmallArgs& a, std::int64_t first_row, float* shared,
                               const float sums[kRowTiles][kInputTiles][4]) {
  using Shape = SmallShape<kRowTiles, kInputTiles>;
  float* own = shared + thread_index() / kWarp * Shape::kSums;
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int j = 0; j < kInputTiles; ++j) {
      QUANTAL_UNROLL
      for (int e = 0; e < 4; ++e) {  // the lanes of one element lie side by side
        own[((i * kInputTiles + j) * 4 + e) * kWarp + thread_index() % kWarp] = sums[i][j][e];
      }
    }
  }
  block_sync();
  for (int o = thread_index(); o < Shape::kRows * Shape::kInputs; o += kSmallThreads) {
    const int r = o % Shape::kRows, m = o / Shape::kRows;
    if (first_row + r >= a.w.rows || m >= a.inputs) continue;
    const int lane = r % 8 * 4 + m % 8 / 2, element = r % 16 / 8 * 2 + m % 2;
    const float* at = shared + ((r / 16 * kInputTiles + m / 8) * 4 + element) * kWarp + lane;
    float sum = 0.0F;
    QUANTAL_UNROLL
    for (int warp = 0; warp < kSmallWarps; ++warp) sum += at[warp * Shape::kSums];
    if (a.bias != nullptr) sum += load_float(a.bias_kind, a.bias, first_row + r);
    a.y[m * a.w.rows + first_row + r] = half_of<kKind>(sum);
  }
}

template <int kBits, Values kValues, FloatKind kKind, int kRowTiles, int kInputTiles>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kSmallThreads, kRowTiles == 1 ? 2 : 1)
    small_matmul_kernel(const SmallArgs a) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if constexpr (kValues == Values::kTable) stage_table(a.w, shared, kSmallThreads);
  const Table table = own_table(shared);
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const std::int64_t first_row = block_x() * (16 * kRowTiles);
  SmallRow rows[kRowTiles][2];
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    rows[i][0] = small_row(a.w, first_row + 16 * i + lane / 4);
    rows[i][1] = small_row(a.w, first_row + 16 * i + 8 + lane / 4);
  }
  float sums[kRowTiles][kInputTiles][4] = {};
  const auto pairs = static_cast<std::uint32_t>((a.w.cols + 31) / 32);
  std::uint32_t pair = static_cast<std::uint32_t>(warp * 4 + lane % 4);
  SmallRaw<kRowTiles> raw = load_step<kBits, kRowTiles>(a.w, rows, pair, pair < pairs);
  // All lanes of a warp make the same number of steps: products need every lane.
  for (std::uint32_t first = static_cast<std::uint32_t>(warp) * 4; first < pairs;
       first += 4 * kSmallWarps, pair += 4 * kSmallWarps) {
    const std::uint32_t next = pair + 4 * kSmallWarps;
    const SmallRaw<kRowTiles> ahead = load_step<kBits, kRowTiles>(a.w, rows, next, next < pairs);
    QUANTAL_UNROLL
    for (std::uint32_t second = 0; second < 2; ++second) {
      multiply_chunk<kBits, kValues, kKind, kRowTiles, kInputTiles>(a, table, rows, raw, pair,
                                                                    second, sums);
    }
    raw = ahead;
  }
  store_sums<kKind, kRowTiles, kInputTiles>(a, first_row, shared + kTableBytes / 4, sums);
}

}  // namespace quantal::cuda

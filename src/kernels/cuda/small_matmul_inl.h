// y = x w^T for up to 32 rows of x, straight from packed codes.
//
// Weights are the 16 x 16 operand of the tensor cores, activations its 16 x 8 partner, so that a
// weight is decoded once for up to 8 rows of x and float32 sums cost nothing. The order of columns
// inside a product is free as long as both operands agree: lane (g, t) of a warp takes 32
// consecutive columns (a pair: at 4 bits one strip, 16 bytes) of rows g and g + 8, four columns per
// product, and the same columns of row g of x. The warps of a block share the columns of its rows;
// their sums are added in order, so results depend on nothing but the shapes.
//
// What keeps memory busy (reckoned, not measured: an H100 moves 25 bytes a nanosecond and
// multiprocessor and answers in some 650 ns, so 14 KiB have to be under way for 85 %): every lane
// copies its strips of the next four steps (two where rows or planes are many) asynchronously into
// shared memory, past the first-level cache, which x keeps. At 4 bits that is 4 KiB a warp, 64 KiB
// for two blocks. Statistics are asked for into the second-level cache when the block begins and
// into registers a step ahead.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/small_decode_inl.h"

namespace quantal::cuda {

inline constexpr int kSmallThreads = 256;
inline constexpr int kSmallWarps = kSmallThreads / kWarp;
inline constexpr int kMaxRingBytes = 64 * 1024;  // codes of a block that are under way
inline constexpr int kStepPairs = 4;             // of a warp: one for each t

/// kRowTiles x 16 rows of weights per block, kInputTiles x 8 rows of x.
template <int kBits, Values kValues, DecodePath kPath, int kRowTiles, int kInputTiles>
struct SmallShape {
  static constexpr int kRows = 16 * kRowTiles, kInputs = 8 * kInputTiles;
  static constexpr int kSums = kRowTiles * kInputTiles * kWarp * 4;  // of a warp
  static constexpr int kTable = small_table_bytes<kPath, kValues>();
  static constexpr int kLaneBytes = 16 * kWarp;  // a strip of each lane
  static constexpr int kStageBytes = kRowTiles * 2 * kPairStrips<kBits> * kLaneBytes;
  static constexpr int kStages = kSmallWarps * kStageBytes * 4 <= kMaxRingBytes ? 4 : 2;
  static constexpr int kWarpBytes = kStages * kStageBytes;  // codes; then sums
  static_assert(kWarpBytes >= kSums * 4);

  static Geometry geometry(std::int64_t rows) {
    return {.blocks_x = (rows + kRows - 1) / kRows,
            .threads = kSmallThreads,
            .shared_bytes = kTable + kSmallWarps * kWarpBytes};
  }
};

/// Row i of those of a lane: g, g + 8, ... of the tiles; beyond the matrix it is the last one.
QUANTAL_DEVICE std::int64_t small_row(const Matrix& w, std::int64_t first_row, int i) {
  const std::int64_t row = first_row + 8 * i + thread_index() % kWarp / 4;
  return row < w.rows ? row : w.rows - 1;
}
/// Where the codes of the rows of a lane begin, and their statistics.
template <int kRowTiles>
struct SmallCodes {
  const std::uint8_t* of[2 * kRowTiles];
};
template <int kRowTiles>
struct SmallStarts {
  RowStart of[2 * kRowTiles];
};
template <int kRowTiles>
QUANTAL_DEVICE SmallCodes<kRowTiles> small_codes(const Matrix& w, std::int64_t first_row) {
  SmallCodes<kRowTiles> rows;
  QUANTAL_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    rows.of[i] = w.codes + small_row(w, first_row, i) * w.code_bytes;
  }
  return rows;
}
template <int kRowTiles>
QUANTAL_DEVICE SmallStarts<kRowTiles> small_starts(const Matrix& w, std::int64_t first_row) {
  SmallStarts<kRowTiles> rows;
  QUANTAL_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i) rows.of[i] = row_start(w, small_row(w, first_row, i));
  return rows;
}

/// Asks for the statistics of a block's rows.
QUANTAL_DEVICE void prefetch_statistics(const Matrix& w, std::int64_t first_row, int rows) {
  constexpr std::int64_t kLine = 128;
  const std::int64_t left = w.rows - first_row;
  const std::int64_t bytes = (left < rows ? left : rows) * w.stat_bytes;
  const std::uint8_t* from = w.stats + first_row * w.stat_bytes;
  for (std::int64_t at = thread_index() * kLine; at < bytes; at += kSmallThreads * kLine) {
    prefetch(from + at);
  }
}

/// 32 columns of a row of x from `pair` on, zeros where there are none.
struct SmallInputs {
  Words4 w[4];
};
QUANTAL_DEVICE SmallInputs load_inputs(const std::uint16_t* x, std::uint32_t cols,
                                       std::uint32_t pair) {
  SmallInputs found{};
  const std::uint32_t col = 2 * pair * kChunk;
  const auto* at = reinterpret_cast<const std::uint8_t*>(x + col);
  if (col < cols) {
    found.w[0] = load_words(at);
    found.w[1] = load_words(at + 16);
  }
  if (col + kChunk < cols) {
    found.w[2] = load_words(at + 32);
    found.w[3] = load_words(at + 48);
  }
  return found;
}

/// Row g of each tile of x; beyond x it is the last one: nobody looks at those sums.
template <int kInputTiles>
struct InputRows {
  const std::uint16_t* of[kInputTiles];
};
template <int kInputTiles>
QUANTAL_DEVICE InputRows<kInputTiles> input_rows(const SmallArgs& a) {
  InputRows<kInputTiles> rows;
  QUANTAL_UNROLL
  for (int j = 0; j < kInputTiles; ++j) {
    const int m = 8 * j + thread_index() % kWarp / 4;
    rows.of[j] = a.x + (m < a.inputs ? m : a.inputs - 1) * a.w.cols;
  }
  return rows;
}

/// Starts to copy the strips of one step of a lane; `inside` is false beyond the row.
template <int kBits, int kRowTiles>
QUANTAL_DEVICE void copy_codes(const Matrix& w, const SmallCodes<kRowTiles>& codes,
                               std::uint32_t pair, bool inside, unsigned char* stage) {
  QUANTAL_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int strip = 0; strip < kPairStrips<kBits>; ++strip) {
      const std::int64_t at = inside ? strip_of<kBits>(w.code_bytes, pair, strip) : 0;
      async_copy16(stage + (i * kPairStrips<kBits> + strip) * 16 * kWarp, codes.of[i] + at, inside);
    }
  }
}
/// Row `i` of what copy_codes brought.
template <int kBits>
QUANTAL_DEVICE RawPair copied_pair(const unsigned char* stage, int i) {
  const auto* at = reinterpret_cast<const Words4*>(stage + i * kPairStrips<kBits> * 16 * kWarp);
  RawPair raw{};
  raw.a = at[0];
  if constexpr (kPairStrips<kBits> == 2) raw.b = at[kWarp];
  return raw;
}

/// Statistics of one step of a lane.
template <DecodePath kPath, int kRowTiles>
struct SmallStatistics {
  RawStatistics<kPath> of[2 * kRowTiles];
};
template <DecodePath kPath, int kRowTiles>
QUANTAL_DEVICE SmallStatistics<kPath, kRowTiles> load_step(const Matrix& w,
                                                           const SmallStarts<kRowTiles>& starts,
                                                           std::uint32_t pair) {
  SmallStatistics<kPath, kRowTiles> step;
  QUANTAL_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    step.of[i] = load_statistics<kPath>(w, starts.of[i], pair);
  }
  return step;
}

/// Adds the products of one pair of columns of 16 rows; `low` and `high` are rows g and g + 8.
template <FloatKind kKind, int kInputTiles>
QUANTAL_DEVICE void multiply_pair(const std::uint32_t low[2][8], const std::uint32_t high[2][8],
                                  const SmallInputs x[kInputTiles], float sums[kInputTiles][4]) {
  QUANTAL_UNROLL
  for (int second = 0; second < 2; ++second) {
    QUANTAL_UNROLL
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t operand[4] = {low[second][2 * k], high[second][2 * k],
                                        low[second][2 * k + 1], high[second][2 * k + 1]};
      QUANTAL_UNROLL
      for (int j = 0; j < kInputTiles; ++j) {
        const Words4& words = x[j].w[2 * second + k / 2];
        const std::uint32_t partner[2] = {words.w[2 * (k % 2)], words.w[2 * (k % 2) + 1]};
        multiply<kKind>(sums[j], operand, partner);
      }
    }
  }
}

/// Adds the sums of the warps in order and writes y. Every warp has done with its codes.
template <class Shape, FloatKind kKind, int kRowTiles, int kInputTiles>
QUANTAL_DEVICE void store_sums(const SmallArgs& a, std::int64_t first_row, unsigned char* shared,
                               const float sums[kRowTiles][kInputTiles][4]) {
  auto* own = reinterpret_cast<float*>(shared + thread_index() / kWarp * Shape::kWarpBytes);
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
    const int at = ((r / 16 * kInputTiles + m / 8) * 4 + element) * kWarp + lane;
    float sum = 0.0F;
    QUANTAL_UNROLL
    for (int warp = 0; warp < kSmallWarps; ++warp) {
      sum += reinterpret_cast<const float*>(shared + warp * Shape::kWarpBytes)[at];
    }
    if (a.bias != nullptr) sum += load_float(a.bias_kind, a.bias, first_row + r);
    a.y[m * a.w.rows + first_row + r] = half_of<kKind>(sum);
  }
}

template <int kBits, Values kValues, DecodePath kPath, FloatKind kKind, int kRowTiles,
          int kInputTiles>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kSmallThreads, kRowTiles == 1 ? 2 : 1)
    small_matmul_kernel(const SmallArgs a) {
  using Shape = SmallShape<kBits, kValues, kPath, kRowTiles, kInputTiles>;
  unsigned char* codes = shared_memory() + Shape::kTable;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  unsigned char* own = codes + warp * Shape::kWarpBytes + lane * 16;
  const std::int64_t first_row = block_x() * Shape::kRows;
  prefetch_statistics(a.w, first_row, Shape::kRows);
  const auto rows = small_codes<kRowTiles>(a.w, first_row);
  const auto inputs = input_rows<kInputTiles>(a);
  const auto cols = static_cast<std::uint32_t>(a.w.cols), pairs = (cols + 31) / 32;
  constexpr std::uint32_t kStride = kStepPairs * kSmallWarps;
  std::uint32_t pair = static_cast<std::uint32_t>(warp * kStepPairs + lane % 4);
  QUANTAL_UNROLL
  for (std::uint32_t s = 0; s < Shape::kStages; ++s) {
    copy_codes<kBits, kRowTiles>(a.w, rows, pair + s * kStride, pair + s * kStride < pairs,
                                 own + s * Shape::kStageBytes);
    async_commit();
  }
  const auto starts = small_starts<kRowTiles>(a.w, first_row);  // reads: behind the first copies
  stage_small_table<kPath, kValues>(a.w, shared_memory(), kSmallThreads);
  const auto decoder = small_decoder<kPath, kKind>(a.w, shared_memory());
  SmallStatistics<kPath, kRowTiles> stats = load_step<kPath, kRowTiles>(a.w, starts, pair);
  float sums[kRowTiles][kInputTiles][4] = {};
  std::uint32_t stage = 0;
  // All lanes of a warp make the same number of steps: products need every lane.
  for (std::uint32_t first = static_cast<std::uint32_t>(warp) * kStepPairs; first < pairs;
       first += kStride, pair += kStride, stage = (stage + 1) % Shape::kStages) {
    const auto ahead = load_step<kPath, kRowTiles>(a.w, starts, pair + kStride);
    SmallInputs x[kInputTiles];
    QUANTAL_UNROLL
    for (int j = 0; j < kInputTiles; ++j) x[j] = load_inputs(inputs.of[j], cols, pair);
    unsigned char* here = own + stage * Shape::kStageBytes;
    async_wait_all_but(Shape::kStages - 1);
    QUANTAL_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      std::uint32_t low[2][8], high[2][8];
      decode_small<kBits, kValues, kPath, kKind>(a.w, decoder, starts.of[2 * i],
                                                 copied_pair<kBits>(here, 2 * i), stats.of[2 * i],
                                                 pair, low);
      decode_small<kBits, kValues, kPath, kKind>(a.w, decoder, starts.of[2 * i + 1],
                                                 copied_pair<kBits>(here, 2 * i + 1),
                                                 stats.of[2 * i + 1], pair, high);
      multiply_pair<kKind, kInputTiles>(low, high, x, sums[i]);
    }
    stats = ahead;
    const std::uint32_t next = pair + Shape::kStages * kStride;
    copy_codes<kBits, kRowTiles>(a.w, rows, next, next < pairs, here);
    async_commit();
  }
  async_wait_all_but(0);
  warp_sync();  // sums take the place of codes that other lanes may still read
  store_sums<Shape, kKind, kRowTiles, kInputTiles>(a, first_row, codes, sums);
}

}  // namespace quantal::cuda

// LLM.int8 (quantal/kernels.h, matmul_int8): activations to int8 by row, exact integer products on
// tensor cores, outlier columns through dequantized weights. Four kernels, in this order; each has
// the operations of the CPU's in their order, so that the bits are the same.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/table_inl.h"
#include "kernels/cuda/tile_inl.h"
#include "kernels/llm_int8.h"

namespace quantal::cuda {

inline constexpr int kInt8Threads = 256;

// ------------------------------------------------------------------ outliers

/// Rows of x that one block looks at.
inline constexpr std::int64_t kMarkRows = 64;
inline Geometry clear_geometry(std::int64_t cols) {
  return {.blocks_x = (cols + kInt8Threads - 1) / kInt8Threads, .threads = kInt8Threads};
}
inline Geometry mark_geometry(std::int64_t cols, std::int64_t inputs) {
  Geometry g = clear_geometry(cols);
  g.blocks_y = (inputs + kMarkRows - 1) / kMarkRows;
  return g;
}

/// marks = 0, before several blocks mark one column.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kInt8Threads, 1) int8_clear(const Int8Args a) {
  const std::int64_t c = block_x() * kInt8Threads + thread_index();
  if (c < a.w.cols) a.scratch.marks[c] = 0;
}

/// marks[c] = some |f16(x[m, c])| >= threshold; a thread takes a column of kMarkRows rows. More
/// rows than that have been cleared.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kInt8Threads, 1) int8_mark(const Int8Args a) {
  const std::int64_t c = block_x() * kInt8Threads + thread_index();
  if (c >= a.w.cols) return;
  bool outlier = false;
  if (a.threshold > 0.0F) {
    const std::int64_t begin = block_y() * kMarkRows;
    const std::int64_t end = begin + kMarkRows < a.inputs ? begin + kMarkRows : a.inputs;
    for (std::int64_t m = begin; m < end; ++m) {
      const float v = round_to<FloatKind::kF16>(load_float(a.kind, a.x, m * a.w.cols + c));
      outlier = outlier || a.threshold <= magnitude(v);
    }
  }
  if (outlier || a.inputs <= kMarkRows) a.scratch.marks[c] = outlier ? 1 : 0;
}

inline Geometry list_geometry() {
  return {.blocks_x = 1, .threads = kInt8Threads, .shared_bytes = kInt8Threads * 4};
}

/// Columns of the marks in ascending order, by one block: every thread lists a part of the columns.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kInt8Threads, 1) int8_list(const Int8Args a) {
  auto* counts = reinterpret_cast<std::int32_t*>(shared_memory());
  const std::int64_t part = (a.w.cols + kInt8Threads - 1) / kInt8Threads;
  const std::int64_t begin = thread_index() * part;
  const std::int64_t end = begin + part < a.w.cols ? begin + part : a.w.cols;
  std::int32_t count = 0;
  for (std::int64_t c = begin; c < end; ++c) count += a.scratch.marks[c];
  counts[thread_index()] = count;
  block_sync();
  std::int32_t at = 0;
  for (int i = 0; i < thread_index(); ++i) at += counts[i];
  for (std::int64_t c = begin; c < end; ++c) {
    if (a.scratch.marks[c] != 0) a.scratch.outliers[1 + at++] = static_cast<std::int32_t>(c);
  }
  if (thread_index() == kInt8Threads - 1) a.scratch.outliers[0] = at;
}

// ------------------------------------------------------------------ activations

inline Geometry round_geometry(std::int64_t inputs) {
  return {
      .blocks_x = inputs, .threads = kInt8Threads, .shared_bytes = 3 * kInt8Threads / kWarp * 4};
}

/// f16(x[m, c]), 0 for outliers.
QUANTAL_DEVICE float int8_inlier(const Int8Args& a, std::int64_t m, std::int64_t c) {
  const float v = round_to<FloatKind::kF16>(load_float(a.kind, a.x, m * a.w.cols + c));
  return a.threshold > 0.0F && a.threshold <= magnitude(v) ? 0.0F : v;
}

/// A block rounds one row: scale = max |x| (NaN after an infinity or NaN), q = rint(x * ((1 /
/// scale)
/// * 127)), 0 for NaN and in outlier columns.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kInt8Threads, 1) int8_round(const Int8Args a) {
  constexpr int kWarps = kInt8Threads / kWarp;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  auto* sums = reinterpret_cast<std::int32_t*>(shared + kWarps);
  const std::int64_t m = block_x();
  const int warp = thread_index() / kWarp;
  float most = 0.0F;
  bool poison = false;
  for (std::int64_t c = thread_index(); c < a.w.cols; c += kInt8Threads) {
    const float v = magnitude(int8_inlier(a, m, c));
    poison = poison || !is_finite(v);
    if (v > most) most = v;
  }
  if (poison) most = float_of_bits(0x7FC00000U);
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };  // keeps NaN
  for (int mask = kWarp / 2; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
  if (thread_index() % kWarp == 0) shared[warp] = most;
  block_sync();
  for (int i = 0; i < kWarps; ++i) most = larger(most, shared[i]);
  const float factor = (1.0F / most) * kInt8Levels;
  std::int32_t sum = 0;
  for (std::int64_t c = thread_index(); c < a.ld; c += kInt8Threads) {
    float r = 0.0F;
    if (c < a.w.cols && a.scratch.marks[c] == 0) r = rounded(int8_inlier(a, m, c) * factor);
    const auto q = static_cast<std::int8_t>(r == r ? static_cast<std::int32_t>(r) : 0);
    a.scratch.q[m * a.ld + c] = q;
    sum += q;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread_index() % kWarp == 0) sums[warp] = sum;
  block_sync();
  if (thread_index() != 0) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i];
  a.scratch.sum[m] = sum;
  a.scratch.scale[m] = most;
}

// ------------------------------------------------------------------ products

inline constexpr int kInt8TileRows = 64, kInt8TileWidth = 128;
inline constexpr int kInt8OutputTiles = kOutputTilesOf<kInt8TileWidth>;
inline constexpr int kInt8LeftBytes = kInt8TileRows * kStepGranules * 16;
inline constexpr int kInt8StageBytes = kInt8LeftBytes + kInt8TileWidth * kStepGranules * 16;

inline Geometry int8_geometry(std::int64_t rows, std::int64_t inputs) {
  return {.blocks_x = (rows + kInt8TileWidth - 1) / kInt8TileWidth,
          .blocks_y = (inputs + kInt8TileRows - 1) / kInt8TileRows,
          .threads = kTileThreads,
          .shared_bytes = 2 * kInt8StageBytes};
}

/// Sum over the outlier columns, in order, of x's own values and rounded weights.
QUANTAL_DEVICE float outlier_sum(const Int8Args& a, std::int64_t m, std::int64_t n, float scale) {
  float sum = 0.0F;
  const std::int32_t count = a.scratch.outliers[0];
  for (std::int32_t j = 0; j < count; ++j) {
    const std::int64_t c = a.scratch.outliers[1 + j];
    const float number =
        static_cast<float>(a.w.codes[n * a.w.code_bytes + c]) - a.w.centre;  // 8 bits: byte c
    float v = round_to(a.w.value_kind, number * scale);
    v = round_to(a.w.value_kind, v * kOneOver127);
    sum = sum + load_float(a.kind, a.x, m * a.w.cols + c) * round_to(a.kind, v);
  }
  return sum;
}

/// y = kind(sum * (scale of x * scale of w) * unit + bias), then the outliers. `sum` is of q and
/// codes - 128.
QUANTAL_DEVICE void store_int8(const Int8Args& a, std::int64_t m, std::int64_t n,
                               std::int32_t sum) {
  if (m >= a.inputs || n >= a.w.rows) return;
  const float scale = plain_scale(a.w, a.w.stats + n * a.w.stat_bytes, 0);
  const auto shift = 128 - static_cast<std::int64_t>(a.w.centre);
  const std::int64_t exact = sum + shift * a.scratch.sum[m];
  const float outer = a.scratch.scale[m] * scale;
  float v = static_cast<float>(exact) * outer * kInt8Unit;
  if (a.bias != nullptr) v = v + load_float(a.bias_kind, a.bias, n);
  if (a.scratch.outliers[0] != 0) {
    const float extra = outlier_sum(a, m, n, scale);
    v = round_to(a.kind, v) + extra;
  }
  store_float(a.kind, a.y, m * a.w.rows + n, v);
}

QUANTAL_DEVICE void multiply_int8_step(const unsigned char* left, const unsigned char* right,
                                       const Fragment& of_left, const Fragment& of_right,
                                       std::int32_t sums[kInt8TileRows / 32][kInt8OutputTiles][4]) {
  constexpr int kRowTiles = kInt8TileRows / 32;
  QUANTAL_UNROLL
  for (int k = 0; k < kStepGranules / 2; ++k) {
    std::uint32_t x[kRowTiles][4];
    QUANTAL_UNROLL
    for (int i = 0; i < kRowTiles; ++i) load_left(left, of_left, 16 * i, k, x[i]);
    QUANTAL_UNROLL
    for (int j = 0; j < kInt8OutputTiles; j += 2) {
      std::uint32_t b[4];
      load_right(right, of_right, 8 * j, k, b);
      QUANTAL_UNROLL
      for (int e = 0; e < 4; ++e) b[e] ^= 0x80808080U;  // bytes 0 .. 255 to code - 128
      QUANTAL_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_s8(sums[i][j], x[i], b);
        multiply_s8(sums[i][j + 1], x[i], b + 2);
      }
    }
  }
}

QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kTileThreads, 1) int8_matmul_kernel(const Int8Args a) {
  constexpr int kRowTiles = kInt8TileRows / 32;
  unsigned char* stages = shared_memory();
  const WarpPlace place = warp_place<kInt8TileRows, kInt8TileWidth>();
  const std::int64_t output = block_x() * kInt8TileWidth, input = block_y() * kInt8TileRows;
  const StepSource x =
      step_source(reinterpret_cast<const unsigned char*>(a.scratch.q) + input * a.ld, a.ld,
                  a.inputs - input, a.ld);
  const StepSource codes = step_source(a.w.codes + output * a.w.code_bytes, a.w.code_bytes,
                                       a.w.rows - output, a.w.code_bytes);
  const Fragment left = left_fragment(place), right = right_fragment(place);
  const auto copy = [&](int stage, std::int64_t from) {
    unsigned char* tile = stages + stage * kInt8StageBytes;
    copy_step<kInt8TileRows>(tile, x, from);
    copy_step<kInt8TileWidth>(tile + kInt8LeftBytes, codes, from);
    async_commit();
  };
  std::int32_t sums[kRowTiles][kInt8OutputTiles][4] = {};
  copy(0, 0);
  int stage = 0;
  for (std::int64_t from = 0; from < a.ld; from += kStepBytes, stage ^= 1) {
    async_wait_all_but(0);
    block_sync();
    if (from + kStepBytes < a.ld) copy(stage ^ 1, from + kStepBytes);
    const unsigned char* tile = stages + stage * kInt8StageBytes;
    multiply_int8_step(tile, tile + kInt8LeftBytes, left, right, sums);
  }
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int j = 0; j < kInt8OutputTiles; ++j) {
      QUANTAL_UNROLL
      for (int e = 0; e < 4; ++e) {
        const std::int64_t m = input + place.row + 16 * i + place.lane / 4 + e / 2 * 8;
        const std::int64_t n = output + place.output + 8 * j + 2 * (place.lane % 4) + e % 2;
        store_int8(a, m, n, sums[i][j][e]);
      }
    }
  }
}

}  // namespace quantal::cuda

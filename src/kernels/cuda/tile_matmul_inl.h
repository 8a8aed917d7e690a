// y = x w^T or y = g w for many rows: tiles of x and of decoded weights in shared memory, products
// on tensor cores (mma.sync), float32 sums. Two steps of the depth are in shared memory; while one
// is multiplied, x of the next is copied asynchronously and its codes wait in registers.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/table_inl.h"
#include "kernels/cuda/tile_inl.h"

namespace quantal::cuda {

inline constexpr int kStepDepth = kStepGranules * 8;

template <int kTileRows>
struct TileShape {
  static constexpr int kLeftBytes = kTileRows * kStepGranules * 16;
  static constexpr int kRightBytes = kTileWidth * kStepGranules * 16;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;

  static Geometry geometry(std::int64_t width, std::int64_t inputs) {
    return {.blocks_x = (width + kTileWidth - 1) / kTileWidth,
            .blocks_y = (inputs + kTileRows - 1) / kTileRows,
            .threads = kTileThreads,
            .shared_bytes = kTableBytes + 2 * kStageBytes};
  }
};

/// The pair of weights that a thread decodes in each step: forward 128 rows of 2 pairs, transposed
/// 64 rows of 4 pairs.
struct TilePair {
  RawPair raw;
  std::int64_t row;
  std::uint32_t pair;
  bool inside;
};
template <bool kTransposed>
QUANTAL_DEVICE TilePair load_weights(const Matrix& w, std::int64_t output, std::int64_t depth) {
  constexpr int kPairs = kTransposed ? 4 : 2;
  const std::int64_t row = (kTransposed ? depth : output) + thread_index() / kPairs;
  const std::int64_t col = (kTransposed ? output : depth) + thread_index() % kPairs * 32;
  TilePair p{{}, row, static_cast<std::uint32_t>(col / 32), row < w.rows && col < w.cols};
  if (p.inside) p.raw = load_pair(w, w.codes + row * w.code_bytes, p.pair);
  return p;
}

template <FloatKind kKind, bool kTransposed>
QUANTAL_DEVICE void store_weights(const Matrix& w, Table table, const TilePair& p,
                                  unsigned char* tile) {
  constexpr int kPairs = kTransposed ? 4 : 2;
  constexpr int kGranules = kTransposed ? kTileWidth / 8 : kStepGranules;
  const int row = thread_index() / kPairs, granule = thread_index() % kPairs * 4;
  const RowStart start = row_start(w, p.inside ? p.row : 0);
  for (std::uint32_t second = 0; second < 2; ++second) {
    float v[kChunk] = {};
    if (p.inside && (2 * p.pair + second) * kChunk < w.cols) {
      decode_chunk(w, table, start, p.raw, p.pair, second, v);
    }
    std::uint32_t words[8];
    pack_chunk<kKind>(v, words);
    const int at = granule + static_cast<int>(second) * 2;
    *reinterpret_cast<Words4*>(tile + granule_offset<kGranules>(row, at)) = {
        {words[0], words[1], words[2], words[3]}};
    *reinterpret_cast<Words4*>(tile + granule_offset<kGranules>(row, at + 1)) = {
        {words[4], words[5], words[6], words[7]}};
  }
}

/// Adds the products of one step.
template <FloatKind kKind, bool kTransposed, int kRowTiles>
QUANTAL_DEVICE void multiply_step(const unsigned char* left, const unsigned char* right,
                                  const WarpPlace& place, float sums[kRowTiles][kOutputTiles][4]) {
  QUANTAL_UNROLL
  for (int k = 0; k < kStepGranules / 2; ++k) {
    std::uint32_t a[kRowTiles][4];
    QUANTAL_UNROLL
    for (int i = 0; i < kRowTiles; ++i) load_left(left, place.row + 16 * i, k, place.lane, a[i]);
    QUANTAL_UNROLL
    for (int j = 0; j < kOutputTiles; j += 2) {
      std::uint32_t b[4];
      if constexpr (kTransposed) {
        load_right_transposed(right, place.output + 8 * j, k, place.lane, b);
      } else {
        load_right(right, place.output + 8 * j, k, place.lane, b);
      }
      QUANTAL_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        multiply<kKind>(sums[i][j], a[i], b);
        multiply<kKind>(sums[i][j + 1], a[i], b + 2);
      }
    }
  }
}

/// Writes outputs (m, n) and (m, n + 1); n is even.
template <FloatKind kKind>
QUANTAL_DEVICE void store_outputs(const TileArgs& a, std::int64_t width, std::int64_t m,
                                  std::int64_t n, float first, float second) {
  if (m >= a.inputs || n >= width) return;
  const bool both = n + 1 < width;
  if (a.bias != nullptr) {
    first += load_float(a.bias_kind, a.bias, n);
    if (both) second += load_float(a.bias_kind, a.bias, n + 1);
  }
  std::uint16_t* to = a.y + m * width + n;
  if (both && width % 2 == 0) {
    *reinterpret_cast<std::uint32_t*>(to) = pair_of<kKind>(first, second);
    return;
  }
  to[0] = half_of<kKind>(first);
  if (both) to[1] = half_of<kKind>(second);
}

template <FloatKind kKind, bool kTransposed, int kTileRows>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kTileThreads, 1) tile_matmul_kernel(const TileArgs a) {
  using Shape = TileShape<kTileRows>;
  constexpr int kRowTiles = kTileRows / 32;
  unsigned char* stages = shared_memory() + kTableBytes;
  auto* table_memory = reinterpret_cast<float*>(shared_memory());
  stage_table(a.w, table_memory, kTileThreads);
  const Table table = own_table(table_memory);
  const WarpPlace place = warp_place<kTileRows>();
  const std::int64_t depth = kTransposed ? a.w.rows : a.w.cols;
  const std::int64_t width = kTransposed ? a.w.cols : a.w.rows;
  const std::int64_t output = block_x() * kTileWidth, input = block_y() * kTileRows;
  const auto* x = reinterpret_cast<const unsigned char*>(a.x + input * depth);
  const auto copy = [&](int stage, std::int64_t from) {
    copy_step<kTileRows>(stages + stage * Shape::kStageBytes, x, depth * 2, a.inputs - input,
                         from * 2, depth * 2);
    async_commit();
  };

  float sums[kRowTiles][kOutputTiles][4] = {};
  copy(0, 0);
  TilePair pair = load_weights<kTransposed>(a.w, output, 0);
  store_weights<kKind, kTransposed>(a.w, table, pair, stages + Shape::kLeftBytes);
  int stage = 0;
  for (std::int64_t from = 0; from < depth; from += kStepDepth, stage ^= 1) {
    async_wait_all_but(0);
    block_sync();  // this stage is written, and nobody reads the other one any more
    const bool more = from + kStepDepth < depth;
    if (more) {
      copy(stage ^ 1, from + kStepDepth);
      pair = load_weights<kTransposed>(a.w, output, from + kStepDepth);
    }
    const unsigned char* tile = stages + stage * Shape::kStageBytes;
    multiply_step<kKind, kTransposed, kRowTiles>(tile, tile + Shape::kLeftBytes, place, sums);
    if (more) {
      store_weights<kKind, kTransposed>(
          a.w, table, pair, stages + (stage ^ 1) * Shape::kStageBytes + Shape::kLeftBytes);
    }
  }
  const int g = place.lane / 4, t = place.lane % 4;
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int j = 0; j < kOutputTiles; ++j) {
      const std::int64_t m = input + place.row + 16 * i + g;
      const std::int64_t n = output + place.output + 8 * j + 2 * t;
      store_outputs<kKind>(a, width, m, n, sums[i][j][0], sums[i][j][1]);
      store_outputs<kKind>(a, width, m + 8, n, sums[i][j][2], sums[i][j][3]);
    }
  }
}

}  // namespace quantal::cuda

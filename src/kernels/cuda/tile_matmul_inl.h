// y = x w^T or y = g w for many rows: tiles of x and of decoded weights in shared memory, products
// on tensor cores (mma.sync), float32 sums. Two steps of the depth are in shared memory; while one
// is multiplied, x of the next is copied asynchronously and its codes wait in registers.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/path_inl.h"
#include "kernels/cuda/tile_inl.h"

namespace quantal::cuda {

inline constexpr int kStepDepth = kStepGranules * 8;

/// kTileRows rows of x by kTileWidth outputs.
template <int kTileRows, int kTileWidth>
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

/// What a kernel knows of its matrix when it is compiled. kBits 0: any width and map.
template <DecodePath kWay, int kWidth>
struct TileForm {
  static constexpr DecodePath kPath = kWay;
  static constexpr int kBits = kWidth;
};

/// The pair of weights that a thread decodes in each step: forward kTileWidth rows of 2 pairs,
/// transposed 64 rows of kTileWidth / 32 pairs; half of the threads have none in a tile of 64
/// outputs. Its codes and statistics wait in registers for the step.
template <DecodePath kPath>
struct TilePair {
  RawPair raw;
  RawStatistics<kPath> stats;
  RowStart start;
  std::uint32_t pair;
  bool inside;
};

/// `forward` is where the statistics of its row begin, which is the same in all steps.
template <class Form, bool kTransposed, int kTileWidth>
QUANTAL_DEVICE TilePair<Form::kPath> load_weights(const Matrix& w, const RowStart& forward,
                                                  std::int64_t output, std::int64_t depth) {
  constexpr int kPairs = kTransposed ? kTileWidth / 32 : 2;
  const std::int64_t row = (kTransposed ? depth : output) + thread_index() / kPairs;
  const std::int64_t col = (kTransposed ? output : depth) + thread_index() % kPairs * 32;
  TilePair<Form::kPath> p{};
  p.pair = static_cast<std::uint32_t>(col / 32);
  p.inside = row < w.rows && col < w.cols && thread_index() < 2 * kTileWidth;
  if (!p.inside) return p;
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  if constexpr (Form::kBits != 0) {
    p.raw = load_pair<Form::kBits>(codes, w.code_bytes, p.pair);
  } else {
    p.raw = load_pair(w, codes, p.pair);
  }
  p.start = kTransposed ? row_start(w, row) : forward;
  p.stats = load_statistics<Form::kPath>(w, p.start, p.pair);
  return p;
}

/// 16 weights of a chunk as 16-bit elements, zeros beyond the matrix.
template <class Form, FloatKind kKind>
QUANTAL_DEVICE void decode_tile_chunk(const Matrix& w, Table table, const HalfForm& halves,
                                      const TilePair<Form::kPath>& p, std::uint32_t second,
                                      std::uint32_t words[8]) {
  float v[kChunk] = {};
  if (!p.inside || (2 * p.pair + second) * kChunk >= w.cols) return pack_chunk<kKind>(v, words);
  if constexpr (Form::kPath == DecodePath::kGeneral) {
    decode_chunk(w, table, p.start, p.raw, p.pair, second, v);
    pack_chunk<kKind>(v, words);
  } else {
    Codes16 codes{};
    if constexpr (Form::kBits != 0) {
      codes = chunk_of<Form::kBits>(p.raw, p.pair, second);
    } else {
      with_width(w.bits, [&](auto bits) {
        codes = chunk_of<decltype(bits)::value>(p.raw, p.pair, second);
      });
    }
    const bool other = second == 1 && cuts_pairs(w, p.start);
    if constexpr (Form::kPath == DecodePath::kHalves) {
      const RawHalves raw = {other ? p.stats.of[1].scale : p.stats.of[0].scale,
                             other ? p.stats.of[1].offset : p.stats.of[0].offset};
      halves_of_chunk<kKind>(codes, halves.minus_origin, half_rule<kKind>(halves, raw), words);
    } else {
      static_assert(Form::kBits == 4);  // the only form of kScaled here is a table of 16 values
      map_codes<Values::kTable>(w, table, codes, v);
      const float scale = other ? scale_of(w, p.stats.of[1]) : scale_of(w, p.stats.of[0]);
      QUANTAL_UNROLL
      for (int j = 0; j < kChunk; ++j) v[j] *= scale;
      pack_chunk<kKind>(v, words);
    }
  }
}

template <class Form, FloatKind kKind, bool kTransposed, int kTileWidth>
QUANTAL_DEVICE void store_weights(const Matrix& w, Table table, const HalfForm& halves,
                                  const TilePair<Form::kPath>& p, unsigned char* tile) {
  if (thread_index() >= 2 * kTileWidth) return;
  constexpr int kPairs = kTransposed ? kTileWidth / 32 : 2;
  constexpr int kGranules = kTransposed ? kTileWidth / 8 : kStepGranules;
  const auto to = fragment<kGranules>(thread_index() / kPairs, thread_index() % kPairs * 4);
  QUANTAL_UNROLL
  for (std::uint32_t second = 0; second < 2; ++second) {
    std::uint32_t words[8];
    decode_tile_chunk<Form, kKind>(w, table, halves, p, second, words);
    QUANTAL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int granule = static_cast<int>(second) * 2 + i;
      *reinterpret_cast<Words4*>(tile + to.base + (to.place ^ (granule * 16))) = {
          {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]}};
    }
  }
}

/// Adds the products of one step.
template <FloatKind kKind, bool kTransposed, int kRowTiles, int kTileWidth>
QUANTAL_DEVICE void multiply_step(const unsigned char* left, const unsigned char* right,
                                  const Fragment& of_left, const Fragment& of_right,
                                  float sums[kRowTiles][kOutputTilesOf<kTileWidth>][4]) {
  QUANTAL_UNROLL
  for (int k = 0; k < kStepGranules / 2; ++k) {
    std::uint32_t a[kRowTiles][4];
    QUANTAL_UNROLL
    for (int i = 0; i < kRowTiles; ++i) load_left(left, of_left, 16 * i, k, a[i]);
    QUANTAL_UNROLL
    for (int j = 0; j < kOutputTilesOf<kTileWidth>; j += 2) {
      std::uint32_t b[4];
      if constexpr (kTransposed) {
        load_right_transposed<kTileWidth>(right, of_right, 8 * j, k, b);
      } else {
        load_right(right, of_right, 8 * j, k, b);
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

/// Writes the outputs of a warp, whose first are (m, n).
template <FloatKind kKind, int kRowTiles, int kOutputTiles>
QUANTAL_DEVICE void store_tile(const TileArgs& a, std::int64_t width, std::int64_t m,
                               std::int64_t n, const float sums[kRowTiles][kOutputTiles][4]) {
  m += thread_index() % kWarp / 4;
  n += thread_index() % 4 * 2;
  QUANTAL_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    QUANTAL_UNROLL
    for (int j = 0; j < kOutputTiles; ++j) {
      const float* v = sums[i][j];
      store_outputs<kKind>(a, width, m + 16 * i, n + 8 * j, v[0], v[1]);
      store_outputs<kKind>(a, width, m + 16 * i + 8, n + 8 * j, v[2], v[3]);
    }
  }
}

template <class Form, FloatKind kKind, bool kTransposed, int kTileRows, int kTileWidth>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kTileThreads, !kTransposed && kTileRows == 64 ? 2 : 1)
    tile_matmul_kernel(const TileArgs a) {
  using Shape = TileShape<kTileRows, kTileWidth>;
  constexpr int kRowTiles = kTileRows / 32, kOutputTiles = kOutputTilesOf<kTileWidth>;
  unsigned char* stages = shared_memory() + kTableBytes;
  auto* table_memory = reinterpret_cast<float*>(shared_memory());
  stage_table(a.w, table_memory, kTileThreads);
  const Table table = own_table(table_memory);
  HalfForm halves{};
  if constexpr (Form::kPath == DecodePath::kHalves) halves = half_form<kKind>(a.w);
  const WarpPlace place = warp_place<kTileRows, kTileWidth>();
  const Fragment left = left_fragment(place);
  const Fragment right =
      kTransposed ? right_transposed_fragment<kTileWidth>(place) : right_fragment(place);
  const std::int64_t depth = kTransposed ? a.w.rows : a.w.cols;
  const std::int64_t width = kTransposed ? a.w.cols : a.w.rows;
  const std::int64_t output = block_x() * kTileWidth, input = block_y() * kTileRows;
  const StepSource x = step_source(reinterpret_cast<const unsigned char*>(a.x + input * depth),
                                   depth * 2, a.inputs - input, depth * 2);
  const auto copy = [&](int stage, std::int64_t from) {
    copy_step<kTileRows>(stages + stage * Shape::kStageBytes, x, from * 2);
    async_commit();
  };

  float sums[kRowTiles][kOutputTiles][4] = {};
  copy(0, 0);
  const std::int64_t own_row = output + thread_index() / 2;
  const RowStart start = row_start(a.w, !kTransposed && own_row < a.w.rows ? own_row : 0);
  auto pair = load_weights<Form, kTransposed, kTileWidth>(a.w, start, output, 0);
  store_weights<Form, kKind, kTransposed, kTileWidth>(a.w, table, halves, pair,
                                                      stages + Shape::kLeftBytes);
  int stage = 0;
  for (std::int64_t from = 0; from < depth; from += kStepDepth, stage ^= 1) {
    async_wait_all_but(0);
    block_sync();  // this stage is written, and nobody reads the other one any more
    const bool more = from + kStepDepth < depth;
    if (more) {
      copy(stage ^ 1, from + kStepDepth);
      pair = load_weights<Form, kTransposed, kTileWidth>(a.w, start, output, from + kStepDepth);
    }
    const unsigned char* tile = stages + stage * Shape::kStageBytes;
    multiply_step<kKind, kTransposed, kRowTiles, kTileWidth>(tile, tile + Shape::kLeftBytes, left,
                                                             right, sums);
    if (more) {
      store_weights<Form, kKind, kTransposed, kTileWidth>(
          a.w, table, halves, pair, stages + (stage ^ 1) * Shape::kStageBytes + Shape::kLeftBytes);
    }
  }
  store_tile<kKind, kRowTiles, kOutputTiles>(a, width, input + place.row, output + place.output,
                                             sums);
}

}  // namespace quantal::cuda

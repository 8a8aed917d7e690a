// Exact values of a panel: a thread decodes 32 columns, or one element where groups end inside
// chunks or statistics are shared by rows.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/table_inl.h"

namespace quantal::cuda {

inline constexpr int kDequantizeThreads = 256;

/// Blocks for `items` threads' worth of work.
inline Geometry dequantize_geometry(std::int64_t items) {
  return {.blocks_x = (items + kDequantizeThreads - 1) / kDequantizeThreads,
          .threads = kDequantizeThreads,
          .shared_bytes = kTableBytes};
}

QUANTAL_DEVICE void pack_chunk(FloatKind kind, const float v[kChunk],
                               std::uint32_t words[kChunk / 2]) {
  if (kind == FloatKind::kF16) {
    pack_chunk<FloatKind::kF16>(v, words);
  } else {
    pack_chunk<FloatKind::kBF16>(v, words);
  }
}

/// Stores the first `count` values of a chunk.
QUANTAL_DEVICE void store_chunk(const DequantizeArgs& a, std::int64_t at, int count,
                                const float v[kChunk]) {
  if (!a.aligned || count < kChunk) {
    QUANTAL_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      if (j < count) store_float(a.out_kind, a.out, at + j, v[j]);
    }
    return;
  }
  if (a.out_kind == FloatKind::kF32) {
    auto* to = reinterpret_cast<Words4*>(static_cast<float*>(a.out) + at);
    QUANTAL_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[i] = {{bits_of_float(v[4 * i]), bits_of_float(v[4 * i + 1]), bits_of_float(v[4 * i + 2]),
                bits_of_float(v[4 * i + 3])}};
    }
    return;
  }
  std::uint32_t words[kChunk / 2];
  pack_chunk(a.out_kind, v, words);
  auto* to = reinterpret_cast<Words4*>(static_cast<std::uint16_t*>(a.out) + at);
  to[0] = {{words[0], words[1], words[2], words[3]}};
  to[1] = {{words[4], words[5], words[6], words[7]}};
}

/// Stores the chunks of two neighbouring lanes, 32 bytes each, in two steps: each step writes one
/// of them whole, half by half, so that no store leaves half a sector of the cache for another.
QUANTAL_DEVICE void store_chunk_in_turn(const DequantizeArgs& a, std::int64_t at,
                                        std::int64_t other, bool inside, const float v[kChunk]) {
  std::uint32_t words[kChunk / 2], given[4];
  pack_chunk(a.out_kind, v, words);
  const bool odd = thread_index() % 2 != 0;
  QUANTAL_UNROLL
  for (int i = 0; i < 4; ++i) given[i] = shuffle_xor(odd ? words[i] : words[4 + i], 1);
  if (!inside) return;
  const auto half = [&](std::int64_t chunk, int second) {
    return reinterpret_cast<Words4*>(static_cast<std::uint16_t*>(a.out) + chunk) + second;
  };
  if (odd) {
    *half(other, 1) = {{given[0], given[1], given[2], given[3]}};
    *half(at, 1) = {{words[4], words[5], words[6], words[7]}};
  } else {
    *half(at, 0) = {{words[0], words[1], words[2], words[3]}};
    *half(other, 0) = {{given[0], given[1], given[2], given[3]}};
  }
}

/// Requires whole_chunks.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kDequantizeThreads, 2)
    dequantize_pairs(const DequantizeArgs a) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  stage_table(a.w, shared, kDequantizeThreads);
  const std::int64_t pairs = (a.cols + 31) / 32;
  const std::int64_t item = block_x() * kDequantizeThreads + thread_index();
  const std::int64_t r = item / pairs;
  const bool inside = r < a.rows;
  const std::int64_t first = item % pairs * 32;
  const auto pair = static_cast<std::uint32_t>((a.col + first) / 32);
  const std::int64_t row = a.row + (inside ? r : 0);
  const RowStart start = row_start(a.w, row);
  const RawPair raw = load_pair(a.w, a.w.codes + row * a.w.code_bytes, pair);
  const bool in_turn = a.aligned && a.cols % 64 == 0 && a.out_kind != FloatKind::kF32;
  for (std::uint32_t second = 0; second < 2; ++second) {
    const std::int64_t c = first + second * kChunk, at = r * a.ld + c;
    float v[kChunk];
    if (in_turn) {  // every lane of a warp comes here
      decode_chunk(a.w, own_table(shared), start, raw, pair, second, v);
      store_chunk_in_turn(a, at, r * a.ld + (c ^ 32), inside, v);
      continue;
    }
    if (!inside || c >= a.cols) return;
    decode_chunk(a.w, own_table(shared), start, raw, pair, second, v);
    const std::int64_t left = a.cols - c;
    store_chunk(a, at, static_cast<int>(left < kChunk ? left : kChunk), v);
  }
}

/// Any form.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kDequantizeThreads, 2)
    dequantize_elements(const DequantizeArgs a) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  stage_table(a.w, shared, kDequantizeThreads);
  const std::int64_t item = block_x() * kDequantizeThreads + thread_index();
  const std::int64_t r = item / a.cols, c = item % a.cols;
  if (r >= a.rows) return;
  const float v = value_at(a.w, own_table(shared), a.row + r, a.col + c);
  store_float(a.out_kind, a.out, r * a.ld + c, v);
}

// ------------------------------------------------------------------ norms

inline constexpr int kNormThreads = 128;

inline Geometry norm_geometry(std::int64_t rows) {
  constexpr std::int64_t kRows = kNormThreads / kWarp;
  return {
      .blocks_x = (rows + kRows - 1) / kRows, .threads = kNormThreads, .shared_bytes = kTableBytes};
}

QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kNormThreads, 4)
    row_square_sums_kernel(const NormArgs a) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  stage_table(a.w, shared, kNormThreads);
  const int lane = thread_index() % kWarp;
  const std::int64_t row = block_x() * (kNormThreads / kWarp) + thread_index() / kWarp;
  if (row >= a.w.rows) return;
  double sum = 0;
  for (std::int64_t c = lane; c < a.w.cols; c += kWarp) {
    const double v = value_at(a.w, own_table(shared), row, c);
    sum += v * v;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) a.out[row] = sum;
}

}  // namespace quantal::cuda

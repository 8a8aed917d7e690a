// The table of 16 values in shared memory, one copy for each lane: entry c of lane l is word
// 32 c + l, so that no two lanes of a warp ask one bank for different words.
#pragma once

#include "kernels/cuda/decode_inl.h"

namespace quantal::cuda {

inline constexpr int kTableBytes = 16 * kWarp * 4;

/// Fills kTableBytes at `shared` by all threads of the block; ends with a barrier.
QUANTAL_DEVICE void stage_table(const Matrix& w, float* shared, int threads) {
  for (int i = thread_index(); i < 16 * kWarp; i += threads) {
    shared[i] = w.table != nullptr ? w.table[i / kWarp] : w.fixed[i / kWarp];
  }
  block_sync();
}
QUANTAL_DEVICE Table own_table(const float* shared) {
  return {shared + thread_index() % kWarp, kWarp};
}

/// Loads a pair of any width.
QUANTAL_DEVICE RawPair load_pair(const Matrix& w, const std::uint8_t* row, std::uint32_t pair) {
  RawPair raw{};
  with_width(w.bits,
             [&](auto bits) { raw = load_pair<decltype(bits)::value>(row, w.code_bytes, pair); });
  return raw;
}

/// decode_chunk for any width and map; the chunk begins inside the row.
QUANTAL_DEVICE void decode_chunk(const Matrix& w, Table table, const RowStart& row,
                                 const RawPair& raw, std::uint32_t pair, std::uint32_t second,
                                 float v[kChunk]) {
  Codes16 codes{};
  with_width(w.bits,
             [&](auto bits) { codes = chunk_of<decltype(bits)::value>(raw, pair, second); });
  map_codes(w, table, codes, v);
  const std::uint32_t col = (2 * pair + second) * kChunk;
  apply_rule<kChunk>(w, slot_statistics(w, row, w.group.quotient(row.phase + col)), v);
}

/// 16 values as 8 registers of two 16-bit elements.
template <FloatKind kKind>
QUANTAL_DEVICE void pack_chunk(const float v[kChunk], std::uint32_t out[kChunk / 2]) {
  QUANTAL_UNROLL
  for (int i = 0; i < kChunk / 2; ++i) out[i] = pair_of<kKind>(v[2 * i], v[2 * i + 1]);
}

template <FloatKind kKind>
QUANTAL_DEVICE void multiply(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  if constexpr (kKind == FloatKind::kF16) {
    multiply_f16(d, a, b);
  } else {
    multiply_bf16(d, a, b);
  }
}

}  // namespace quantal::cuda

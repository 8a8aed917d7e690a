// How small_matmul decodes a pair of chunks of one row into 16-bit elements.
#pragma once

#include "kernels/cuda/path_inl.h"

namespace quantal::cuda {

// ------------------------------------------------------------------ tables

/// kScaled looks up both codes of a byte at once: entry e, {value of its low code, of its high
/// code}, stands at byte 128 e + 8 (lane % 16), so that the lanes of half a warp, which a load of 8
/// bytes serves together, ask different banks.
inline constexpr int kPairTableBytes = 256 * 16 * 8;

template <DecodePath kPath, Values kValues>
constexpr int small_table_bytes() {
  if (kValues != Values::kTable) return 0;
  return kPath == DecodePath::kScaled ? kPairTableBytes : kTableBytes;
}

/// Fills the table by all threads of the block; ends with a barrier where there is one.
template <DecodePath kPath, Values kValues>
QUANTAL_DEVICE void stage_small_table(const Matrix& w, unsigned char* memory, int threads) {
  if constexpr (kValues == Values::kTable) {
    if constexpr (kPath == DecodePath::kGeneral) {
      stage_table(w, reinterpret_cast<float*>(memory), threads);
    } else {
      for (int i = thread_index(); i < 256 * 16; i += threads) {
        const int low = i / 16 % 16, high = i / 256;
        auto* to = reinterpret_cast<float*>(memory) + 2 * i;
        to[0] = w.table != nullptr ? w.table[low] : w.fixed[low];
        to[1] = w.table != nullptr ? w.table[high] : w.fixed[high];
      }
      block_sync();
    }
  }
}

// ------------------------------------------------------------------ weights

/// What decoding needs beside the row: the table in shared memory, the place of the lane in each of
/// its entries, and constants of the matrix.
struct SmallDecoder {
  const unsigned char* table;
  std::uint32_t place;
  HalfForm form;
};

template <DecodePath kPath, FloatKind kKind>
QUANTAL_DEVICE SmallDecoder small_decoder(const Matrix& w, const unsigned char* memory) {
  const auto lane = static_cast<std::uint32_t>(thread_index() % kWarp);
  SmallDecoder d{memory, kPath == DecodePath::kScaled ? lane % 16 * 8 : lane * 4, {}};
  if constexpr (kPath == DecodePath::kHalves) d.form = half_form<kKind>(w);
  return d;
}

/// Both chunks of a pair through a table of pairs, four bits: byte j of its strip holds column j of
/// both.
template <FloatKind kKind>
QUANTAL_DEVICE void decode_by_table(const SmallDecoder& d, const RawPair& raw, float first,
                                    float second, std::uint32_t out[2][8]) {
  QUANTAL_UNROLL
  for (int k = 0; k < 4; ++k) {
    float low[4], high[4];
    QUANTAL_UNROLL
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t word = raw.a.w[k];
      const std::uint32_t entry = (j == 0 ? word << 7 : word >> (8 * j - 7)) & 0x7F80U;
      const Float2 both = *reinterpret_cast<const Float2*>(d.table + (entry | d.place));
      low[j] = both.x * first;
      high[j] = both.y * second;
    }
    QUANTAL_UNROLL
    for (int i = 0; i < 2; ++i) {
      out[0][2 * k + i] = pair_of<kKind>(low[2 * i], low[2 * i + 1]);
      out[1][2 * k + i] = pair_of<kKind>(high[2 * i], high[2 * i + 1]);
    }
  }
}

/// Weights of a pair of one row, 16-bit elements in order; of no importance where x has none.
template <int kBits, Values kValues, DecodePath kPath, FloatKind kKind>
QUANTAL_DEVICE void decode_small(const Matrix& w, const SmallDecoder& d, const RowStart& row,
                                 const RawPair& raw, const RawStatistics<kPath>& stats,
                                 std::uint32_t pair, std::uint32_t out[2][8]) {
  const bool cut = cuts_pairs(w, row);
  float scale[2] = {};
  if constexpr (kPath == DecodePath::kScaled) {
    scale[0] = scale[1] = scale_of(w, stats.of[0]);
    if (cut) scale[1] = scale_of(w, stats.of[1]);
    if constexpr (kValues == Values::kTable) {
      decode_by_table<kKind>(d, raw, scale[0], scale[1], out);
      return;
    }
  }
  const Table table{reinterpret_cast<const float*>(d.table + d.place), kWarp};
  QUANTAL_UNROLL
  for (std::uint32_t second = 0; second < 2; ++second) {
    if constexpr (kPath == DecodePath::kHalves) {
      const bool other = second == 1 && cut;
      const RawHalves halves = {other ? stats.of[1].scale : stats.of[0].scale,
                                other ? stats.of[1].offset : stats.of[0].offset};
      halves_of_chunk<kKind>(chunk_of<kBits>(raw, pair, second), d.form.minus_origin,
                             half_rule<kKind>(d.form, halves), out[second]);
    } else {
      float v[kChunk] = {};
      if constexpr (kPath == DecodePath::kScaled) {
        map_codes<kValues>(w, table, chunk_of<kBits>(raw, pair, second), v);
        QUANTAL_UNROLL
        for (int j = 0; j < kChunk; ++j) v[j] *= scale[second];
      } else if ((2 * pair + second) * kChunk < w.cols) {
        decode_chunk<kBits, kValues>(w, table, row, raw, pair, second, v);
      }
      pack_chunk<kKind>(v, out[second]);
    }
  }
}

}  // namespace quantal::cuda

// From packed bytes to exact values, for host and device: the functions that every kernel decodes
// with and that tests run over all codes of all forms against kernels/ref on the CPU.
//
// A chunk is 16 consecutive columns of a row, a pair two chunks. 2 to 5 instructions a code for its
// bits and number, 1 to 6 more for the rule.
#pragma once

#include <cstdint>

#include "kernels/cuda/floats_inl.h"
#include "kernels/cuda/matrix.h"
#include "kernels/planes.h"
#include "kernels/widths.h"

namespace quantal::cuda {

inline constexpr int kChunk = 16;

// ------------------------------------------------------------------ codes

/// Codes of a chunk: byte i of w[k] is code 4 k + i.
struct Codes16 {
  std::uint32_t w[4];
};

QUANTAL_HD constexpr std::uint32_t byte_mask(int bits) {
  return 0x01010101U * ((1U << static_cast<unsigned>(bits)) - 1U);
}

QUANTAL_HD Words4 load_words(const std::uint8_t* p) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#else
  Words4 v;
  __builtin_memcpy(&v, __builtin_assume_aligned(p, 16), sizeof(v));
  return v;
#endif
}

/// The strips of a pair: one of the low plane (8 bits: two), and that of the high plane.
struct RawPair {
  Words4 a, b;
};

/// Strips that hold a pair.
template <int kBits>
inline constexpr int kPairStrips = kBits == 8 || Planes<kBits>::kHigh != 0 ? 2 : 1;

/// Where strip `strip` of pair number `pair` begins in its row. Nothing is read behind the row's
/// `row_bytes`: at 8 bits the second chunk of the last pair may not exist, and is the first one
/// then.
template <int kBits>
QUANTAL_HD std::int64_t strip_of(std::int64_t row_bytes, std::uint32_t pair, int strip) {
  using W = Planes<kBits>;
  if constexpr (kBits == 8) {
    const std::int64_t at = static_cast<std::int64_t>(pair) * 32;
    return strip == 1 && at + 16 < row_bytes ? at + 16 : at;
  } else {
    const std::uint32_t unit = 2 * pair / W::kUnitChunks, inside = 2 * pair % W::kUnitChunks;
    return static_cast<std::int64_t>(unit) * W::kUnitBytes +
           (strip == 1 ? W::kLowBytes : static_cast<std::int64_t>(inside / W::kFields) * 16);
  }
}

/// Pair number `pair` of the row whose codes begin at `row`.
template <int kBits>
QUANTAL_HD RawPair load_pair(const std::uint8_t* row, std::int64_t row_bytes, std::uint32_t pair) {
  RawPair raw{};
  raw.a = load_words(row + strip_of<kBits>(row_bytes, pair, 0));
  if constexpr (kPairStrips<kBits> == 2)
    raw.b = load_words(row + strip_of<kBits>(row_bytes, pair, 1));
  return raw;
}

/// The pair's first chunk (second = 0) or its second.
template <int kBits>
QUANTAL_HD Codes16 chunk_of(const RawPair& raw, std::uint32_t pair, std::uint32_t second) {
  using W = Planes<kBits>;
  Codes16 out;
  if constexpr (kBits == 8) {
    QUANTAL_UNROLL
    for (int k = 0; k < 4; ++k) out.w[k] = second == 0 ? raw.a.w[k] : raw.b.w[k];
  } else {
    const std::uint32_t inside = (2 * pair + second) % W::kUnitChunks;
    const std::uint32_t low_shift = W::kLow * (inside % W::kFields);
    QUANTAL_UNROLL
    for (int k = 0; k < 4; ++k) {
      out.w[k] = raw.a.w[k] >> low_shift & byte_mask(W::kLow);
      if constexpr (W::kHigh != 0) {
        out.w[k] |= (raw.b.w[k] >> (W::kHigh * inside) & byte_mask(W::kHigh)) << W::kLow;
      }
    }
  }
  return out;
}

/// The code of one column.
template <int kBits>
QUANTAL_HD std::uint32_t code_at(const std::uint8_t* row, std::int64_t col) {
  using W = Planes<kBits>;
  const std::int64_t chunk = col / kChunk;
  const auto inside = static_cast<std::uint32_t>(chunk % W::kUnitChunks);
  const std::uint8_t* unit = row + chunk / W::kUnitChunks * W::kUnitBytes + col % kChunk;
  std::uint32_t code =
      unit[inside / W::kFields * 16] >> (W::kLow * (inside % W::kFields)) & ((1U << W::kLow) - 1U);
  if constexpr (W::kHigh != 0) {
    code |= (unit[W::kLowBytes] >> (W::kHigh * inside) & ((1U << W::kHigh) - 1U)) << W::kLow;
  }
  return code;
}

// ------------------------------------------------------------------ values before scaling

/// A table whose entry c stands at at[c * stride]: kernels keep a copy for each lane.
struct Table {
  const float* at;
  int stride;
};

/// Byte i of a word as a float: 2^23 + byte is the pattern 0x4B0000xx.
QUANTAL_HD float offset_number(std::uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(__byte_perm(word, 0x4B000000U, 0x7440U | i));
#else
  return float_of_bits(0x4B000000U | (word >> (8 * i) & 0xFFU));
#endif
}

/// v[j] = value of code j before scaling.
template <Values kValues>
QUANTAL_HD void map_codes(const Matrix& w, Table table, const Codes16& codes, float v[kChunk]) {
  const float origin = 8388608.0F + w.centre;  // exact: |centre| <= 255
  QUANTAL_UNROLL
  for (int j = 0; j < kChunk; ++j) {
    const std::uint32_t word = codes.w[j / 4];
    const std::uint32_t code = word >> (8 * (j % 4)) & 0xFFU;
    if constexpr (kValues == Values::kNumber) v[j] = offset_number(word, j % 4) - origin;
    if constexpr (kValues == Values::kTable) {
      v[j] = table.at[static_cast<int>(code) * table.stride];
    }
    if constexpr (kValues == Values::kE4M3) v[j] = of_e4m3(code);
    if constexpr (kValues == Values::kE5M2) v[j] = of_e5m2(code);
  }
}
QUANTAL_HD void map_codes(const Matrix& w, Table table, const Codes16& codes, float v[kChunk]) {
  switch (w.values) {
    case Values::kNumber:
      return map_codes<Values::kNumber>(w, table, codes, v);
    case Values::kTable:
      return map_codes<Values::kTable>(w, table, codes, v);
    case Values::kE4M3:
      return map_codes<Values::kE4M3>(w, table, codes, v);
    case Values::kE5M2:
      return map_codes<Values::kE5M2>(w, table, codes, v);
  }
}

// ------------------------------------------------------------------ statistics

struct Statistics {
  float scale, offset;
};

QUANTAL_HD std::uint32_t half_at(const std::uint8_t* p) {
  return p[0] | static_cast<std::uint32_t>(p[1]) << 8;
}

/// A scale or offset that stands for itself: element i of those that begin at `from`.
QUANTAL_HD float plain_scale(const Matrix& w, const std::uint8_t* from, std::int64_t i) {
  switch (w.scale) {
    case ScaleKind::kE8M0:
      return round_to(w.value_kind, of_e8m0(from[i]));
    case ScaleKind::kE4M3:
      return round_to(w.value_kind, of_e4m3(from[i]));
    default:
      return load_float(static_cast<FloatKind>(w.scale), from, i);
  }
}

/// Where the statistics of a row begin, behind its header. Phases come from outside and are bounded
/// so that no slot beyond the row is ever read.
struct RowStart {
  const std::uint8_t* stats;
  std::uint32_t phase, nested_phase;
};
QUANTAL_HD RowStart row_start(const Matrix& w, std::int64_t row) {
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  if (!w.has_header) return {stats, 0, 0};
  const std::uint32_t phase = half_at(stats) | static_cast<std::uint32_t>(stats[2]) << 16;
  const std::uint32_t nested = stats[3];
  return {stats + 4, phase < w.last_phase ? phase : w.last_phase,
          nested < w.last_nested ? nested : w.last_nested};
}

/// scale = map[u8] * absmax2[block] + offset, product and sum rounded.
QUANTAL_HD float nested_scale(const Matrix& w, const RowStart& row, std::uint32_t slot) {
  const std::uint32_t block = w.nested_group.quotient(row.nested_phase + slot);
  const std::uint8_t* at = row.stats + w.slots + 4 * block;  // not aligned
  const float outer = float_of_bits(half_at(at) | half_at(at + 2) << 16);
  const float product = w.nested[1 + row.stats[slot]] * outer;
  return product + w.nested[0];
}

/// scale = float(super) * sub-scale, offset = float(super_offset) * sub-offset.
QUANTAL_HD Statistics super_scale(const Matrix& w, const RowStart& row, std::uint32_t slot) {
  const bool nibbles = w.scale == ScaleKind::kSuperU4;
  const std::uint32_t block = w.nested_group.quotient(slot);
  const std::uint8_t* supers =
      row.stats + (w.has_offsets && !nibbles ? 2 : 1) * w.slots + 2 * block;
  const std::uint32_t byte = row.stats[slot];
  int sub = static_cast<int>(nibbles ? byte & 15U : byte);
  if (w.scale == ScaleKind::kSuperI8 && sub > 127) sub -= 256;
  Statistics s{};
  s.scale = of_f16(static_cast<std::uint16_t>(half_at(supers))) * static_cast<float>(sub);
  if (w.has_offsets) {
    const std::uint32_t sub_offset = nibbles ? byte >> 4 : row.stats[w.slots + slot];
    s.offset = of_f16(static_cast<std::uint16_t>(half_at(supers + 2 * w.nested_slots))) *
               static_cast<float>(sub_offset);
  }
  return s;
}

/// Statistics of slot number `slot` of a row (row runs).
QUANTAL_HD Statistics slot_statistics(const Matrix& w, const RowStart& row, std::uint32_t slot) {
  switch (w.scale) {
    case ScaleKind::kNestedU8:
      return {nested_scale(w, row, slot), 0.0F};
    case ScaleKind::kSuperU8:
    case ScaleKind::kSuperI8:
    case ScaleKind::kSuperU4:
      return super_scale(w, row, slot);
    default:
      return {plain_scale(w, row.stats, slot),
              w.has_offsets ? plain_scale(w, row.stats, static_cast<std::int64_t>(w.slots) + slot)
                            : 0.0F};
  }
}

/// Statistics of one element, whatever the group map.
QUANTAL_HD Statistics statistics_at(const Matrix& w, std::int64_t row, std::int64_t col) {
  if (w.groups == GroupKind::kRowRuns) {
    const RowStart start = row_start(w, row);
    return slot_statistics(w, start,
                           w.group.quotient(start.phase + static_cast<std::uint32_t>(col)));
  }
  const std::int64_t index = w.groups == GroupKind::kColumnRuns
                                 ? (row * w.cols + col) % w.column_stats
                                 : row / w.group.divisor * w.cols + col;
  const std::uint8_t* stats = w.stats + index * w.stat_bytes;
  return {plain_scale(w, stats, 0), w.has_offsets ? plain_scale(w, stats, 1) : 0.0F};
}

// ------------------------------------------------------------------ values

/// The value of a mapped code, each step rounded (quantal::Offset).
template <OffsetKind kOffset, FloatKind kKind>
QUANTAL_HD float finish(float c, Statistics s) {
  if constexpr (kOffset == OffsetKind::kZeroPoint) {
    return round_to<kKind>(round_to<kKind>(c - s.offset) * s.scale);
  }
  const float scaled = round_to<kKind>(c * s.scale);
  if constexpr (kOffset == OffsetKind::kBias) return round_to<kKind>(scaled + s.offset);
  if constexpr (kOffset == OffsetKind::kShift) return round_to<kKind>(scaled - s.offset);
  if constexpr (kOffset == OffsetKind::kOver127) return round_to<kKind>(scaled * kOneOver127);
  return scaled;
}

template <OffsetKind kOffset, int kCount>
QUANTAL_HD void finish_all(FloatKind kind, Statistics s, float* v) {
  switch (kind) {
    case FloatKind::kF32:
      QUANTAL_UNROLL
      for (int j = 0; j < kCount; ++j) v[j] = finish<kOffset, FloatKind::kF32>(v[j], s);
      return;
    case FloatKind::kF16:
      QUANTAL_UNROLL
      for (int j = 0; j < kCount; ++j) v[j] = finish<kOffset, FloatKind::kF16>(v[j], s);
      return;
    case FloatKind::kBF16:
      QUANTAL_UNROLL
      for (int j = 0; j < kCount; ++j) v[j] = finish<kOffset, FloatKind::kBF16>(v[j], s);
      return;
  }
}

/// v[j] from mapped codes to values, all under the same statistics.
template <int kCount>
QUANTAL_HD void apply_rule(const Matrix& w, Statistics s, float* v) {
  switch (w.offset) {
    case OffsetKind::kNone:
      return finish_all<OffsetKind::kNone, kCount>(w.value_kind, s, v);
    case OffsetKind::kBias:
      return finish_all<OffsetKind::kBias, kCount>(w.value_kind, s, v);
    case OffsetKind::kShift:
      return finish_all<OffsetKind::kShift, kCount>(w.value_kind, s, v);
    case OffsetKind::kZeroPoint:
      return finish_all<OffsetKind::kZeroPoint, kCount>(w.value_kind, s, v);
    case OffsetKind::kOver127:
      return finish_all<OffsetKind::kOver127, kCount>(w.value_kind, s, v);
  }
}

/// w(row, col), for any form.
QUANTAL_HD float value_at(const Matrix& w, Table table, std::int64_t row, std::int64_t col) {
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  std::uint32_t code = 0;
  with_width(w.bits, [&](auto bits) { code = code_at<decltype(bits)::value>(codes, col); });
  float v = w.values == Values::kNumber  ? static_cast<float>(code) - w.centre
            : w.values == Values::kTable ? table.at[static_cast<int>(code) * table.stride]
            : w.values == Values::kE4M3  ? of_e4m3(code)
                                         : of_e5m2(code);
  apply_rule<1>(w, statistics_at(w, row, col), &v);
  return v;
}

/// Values of the chunk `second` of a pair whose strips are loaded (whole_chunks holds). Columns
/// beyond the row are 0.
template <int kBits, Values kValues>
QUANTAL_HD void decode_chunk(const Matrix& w, Table table, const RowStart& row, const RawPair& raw,
                             std::uint32_t pair, std::uint32_t second, float v[kChunk]) {
  const std::uint32_t col = (2 * pair + second) * kChunk;
  map_codes<kValues>(w, table, chunk_of<kBits>(raw, pair, second), v);
  apply_rule<kChunk>(w, slot_statistics(w, row, w.group.quotient(row.phase + col)), v);
}

}  // namespace quantal::cuda

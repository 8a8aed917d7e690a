// What the bfloat16 products share: the vector type, the order of columns in scratch, values of
// codes as bfloat16, sums of lanes. AVX-512 with BF16 only; included by *_avx512bf16.cpp alone.
//
// vdpbf16ps multiplies 32 pairs exactly and adds two products to each of 16 float32 lanes; it reads
// subnormal operands as zero. Weights are rounded to bfloat16, as the panels of larger products
// are; those of dialects whose values are bfloat16 stay what they are.
//
// Order of columns: with F fields of codes in a byte (below), steps of 32 F columns are 2 F chunks
// of 16, and stand as F vectors of 32: vector f holds chunks f and F + f. That is what lookups
// yield from 32 bytes of codes; F = 1 is the order of memory.
#pragma once

#include "kernels/cpu/dequantize_inl.h"
#include "kernels/cpu/products_avx512_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// VecAvx512 with the instruction that rounds to bfloat16: three to eight times fewer, but
/// subnormal numbers become zero, so codecs don't use it.
struct VecBf16 : VecAvx512 {
  static __m256i narrow_bf16(F a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)); }
  static F round_bf16(F a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bf16(a)), 16));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
  }
};

/// Scratch and packed activations are zero up to a multiple of this many columns.
constexpr std::int64_t kPadColumns = 64;

/// Fields F of the fast decoders by width, 0 if there is none: a step is 32 bytes of the low plane
/// (64 of 5-bit codes, whose unit is that long).
constexpr int fields_of(int bits) {
  constexpr int kFields[] = {0, 0, 4, 4, 2, 4, 2, 0, 1};
  return kFields[bits];
}
constexpr bool has_planes(int bits) { return bits == 5 || bits == 6; }

/// Fields of the decoder that this matrix gets, 0: any groups, columns in order. Groups are whole
/// steps, or halves of one; of 5 and 6 bits also smaller parts.
inline int step_fields(const KernelMatrix& w) {
  const std::int64_t step = 32 * fields_of(w.bits);
  if (step == 0 || w.groups != GroupKind::kRowRuns || w.cols % w.group_size != 0) return 0;
  const bool parts = has_planes(w.bits) ? w.group_size % kLanes == 0 && step % w.group_size == 0
                                        : w.bits <= 4 && w.group_size == step / 2;
  if ((w.group_size % step != 0 && !parts) || w.cols % step != 0) return 0;
  if (w.bits == 8 ? w.code_kind == CodeKind::kE5M2 : w.offset == OffsetKind::kOver127) return 0;
  return fields_of(w.bits);
}

/// Columns of a slot of the statistics that steps get: of 5 and 6 bits each chunk has its own.
inline std::int64_t slot_columns(const KernelMatrix& w) {
  return has_planes(w.bits) ? kLanes : w.group_size;
}

/// to[c] = from[(phase + 16 c) / group_size] for the chunks of `count` columns.
inline void repeat_for_chunks(const float* from, std::int64_t group_size, std::int64_t phase,
                              std::int64_t count, float* to) {
  const std::int64_t chunks = (count + kLanes - 1) / kLanes;
  if (group_size == 2 * kLanes) {
    const __m512i twice = _mm512_srli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1);
    for (std::int64_t c = 0; c < chunks; c += kLanes, from += kLanes / 2) {
      _mm512_storeu_ps(to + c, _mm512_permutexvar_ps(twice, _mm512_loadu_ps(from)));
    }
    return;
  }
  repeat_outer<VecBf16>(from, group_size / kLanes, phase / kLanes, chunks, to);
}

/// expand_stretch with a slot for every slot_columns; step_fields is not 0.
inline void expand_steps(const KernelMatrix& w, std::int64_t row, std::int64_t col,
                         std::int64_t count, Stretch& out) {
  if (!has_planes(w.bits) || w.group_size == kLanes) {
    return expand_stretch<VecBf16>(w, row, col, count, out);
  }
  Stretch groups;
  expand_stretch<VecBf16>(w, row, col, count, groups);
  repeat_for_chunks(groups.scale, w.group_size, groups.phase, count, out.scale);
  if (w.offset != OffsetKind::kNone) {
    repeat_for_chunks(groups.offset, w.group_size, groups.phase, count, out.offset);
  }
  out.phase = 0;
}

// ------------------------------------------------------------------ values of a step

/// A value before its last rounding to bfloat16.
template <class V>
__m512 wide_value(__m512 c, __m512 s, __m512 o) {
  if constexpr (V::kKind != FloatKind::kBF16) return V::template value<VecBf16>(c, s, o);
  if constexpr (V::kOffset == OffsetKind::kZeroPoint) {
    return _mm512_mul_ps(VecBf16::round_bf16(_mm512_sub_ps(c, o)), s);
  }
  const __m512 scaled = _mm512_mul_ps(c, s);
  if constexpr (V::kOffset == OffsetKind::kBias) {
    return _mm512_add_ps(VecBf16::round_bf16(scaled), o);
  }
  if constexpr (V::kOffset == OffsetKind::kShift) {
    return _mm512_sub_ps(VecBf16::round_bf16(scaled), o);
  }
  if constexpr (V::kOffset == OffsetKind::kOver127) {
    return _mm512_mul_ps(VecBf16::round_bf16(scaled), _mm512_set1_ps(kOneOver127));
  }
  return scaled;
}

/// Codes of 2, 3 or 4 bits, looked up in tables of a group's values. kHalves: a step holds two
/// groups, whose tables are the halves of a register.
template <int kCodeBits, bool kHalves>
struct Lookup {
  static constexpr int kBits = kCodeBits;
  static constexpr int kFields = fields_of(kBits);
  static constexpr std::int64_t kColumns = 32 * kFields;
  static constexpr std::int64_t kBytes = kColumns * kBits / 8;
  static constexpr std::int64_t kGroupsOfStep = kHalves ? 2 : 1;
  using Group = __m512i;

  /// Field kField of the low plane in the low bits of 32 words, above it the high plane.
  template <int kField>
  static __m512i index(__m512i low, __m512i high) {
    constexpr int kLow = Planes<kBits>::kLow;
    const __m512i at = kField == 0 ? low : _mm512_srli_epi16(low, kLow * kField);
    if constexpr (kBits != 3) return at;
    const __m512i bit = kField < 2   ? _mm512_slli_epi16(high, 2 - kField)
                        : kField > 2 ? _mm512_srli_epi16(high, kField - 2)
                                     : high;
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), at, bit, 0xCA);
  }
  template <int kField>
  [[gnu::always_inline]] static void look_up_from(__m512i low, __m512i high, __m512i table,
                                                  __m512i (&out)[kFields]) {
    if constexpr (kField < kFields) {
      __m512i at = index<kField>(low, high);
      if constexpr (kHalves) {  // vpermw reads five bits: the fifth chooses the half
        const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        at = _mm512_ternarylogic_epi32(at, _mm512_set1_epi16(15), upper, 0xEA);  // (a & b) | c
      }
      out[kField] = _mm512_permutexvar_epi16(at, table);
      look_up_from<kField + 1>(low, high, table, out);
    }
  }
  /// Values of the step whose codes begin at `step`.
  [[gnu::always_inline]] static void look_up(const std::uint8_t* step, const Group& table,
                                             __m512i (&out)[kFields]) {
    const auto* low = reinterpret_cast<const __m256i*>(step);
    __m512i high = _mm512_setzero_si512();
    if constexpr (kBits == 3) {  // bit f of a byte belongs to chunk f, the upper four to lanes 16..
      const auto* strip = reinterpret_cast<const __m128i*>(step + 32);
      const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(strip));
      high = _mm512_inserti64x4(_mm512_castsi256_si512(bits), _mm256_srli_epi16(bits, 4), 1);
    }
    look_up_from<0>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(low)), high, table, out);
  }
};

/// Tables from statistics.
template <class V, class L, bool kHalves>
struct TableStep : L {
  __m512 codes;

  explicit TableStep(const KernelMatrix& w) : codes(_mm512_loadu_ps(w.table)) {}

  [[gnu::always_inline]] __m512 values(const Stretch& stats, std::int64_t slot) const {
    return wide_value<V>(codes, _mm512_set1_ps(stats.scale[slot]),
                         _mm512_set1_ps(stats.offset[slot]));
  }
  [[gnu::always_inline]] typename L::Group group(const Stretch& stats, std::int64_t slot) const {
    if constexpr (kHalves) return narrow_two(values(stats, slot), values(stats, slot + 1));
    return _mm512_broadcast_i64x4(VecBf16::narrow_bf16(values(stats, slot)));
  }
  /// Those of two steps of one group each: conversions cost most of a table.
  [[gnu::always_inline]] void two_groups(const Stretch& stats, std::int64_t slot,
                                         typename L::Group (&out)[2]) const {
    const __m512i both = narrow_two(values(stats, slot), values(stats, slot + 1));
    out[0] = _mm512_shuffle_i64x2(both, both, 0x44);
    out[1] = _mm512_shuffle_i64x2(both, both, 0xEE);
  }
};

/// 8-bit codes, computed 16 at a time.
template <class V, class R>
struct NumberStep {
  static constexpr int kFields = 1;
  static constexpr std::int64_t kColumns = 32;
  static constexpr std::int64_t kBytes = 32;
  static constexpr std::int64_t kGroupsOfStep = 1;
  struct Group {
    __m512 scale, offset;
  };
  R reader;

  explicit NumberStep(const KernelMatrix& w) : reader(w) {}
  static Group group(const Stretch& stats, std::int64_t slot) {
    return {_mm512_set1_ps(stats.scale[slot]), _mm512_set1_ps(stats.offset[slot])};
  }
  [[gnu::always_inline]] void look_up(const std::uint8_t* step, const Group& g,
                                      __m512i (&out)[1]) const {
    const auto half = [&](const std::uint8_t* from) {
      return wide_value<V>(reader.map(VecBf16::load_u8(from)), g.scale, g.offset);
    };
    out[0] = narrow_two(half(step), half(step + kLanes));
  }
};

/// Codes of 5 and 6 bits, computed 16 at a time: a low plane of 4 bits and a strip of the others.
template <class V, int kCodeBits>
struct PlaneStep {
  static constexpr int kFields = fields_of(kCodeBits);
  static constexpr std::int64_t kColumns = 32 * kFields;
  static constexpr std::int64_t kBytes = kColumns * kCodeBits / 8;
  static constexpr std::int64_t kGroupsOfStep = kColumns / kLanes;
  static constexpr int kHigh = Planes<kCodeBits>::kHigh;
  struct Group {
    const Stretch& stats;
    std::int64_t slot;  // of the first chunk
  };
  __m512 centre;

  explicit PlaneStep(const KernelMatrix& w) : centre(_mm512_set1_ps(w.centre)) {}
  static Group group(const Stretch& stats, std::int64_t slot) { return {stats, slot}; }
  [[gnu::always_inline]] void look_up(const std::uint8_t* step, const Group& g,
                                      __m512i (&out)[kFields]) const {
    look_up_from<0>(step, VecBf16::load_u8(step + kLanes * kFields), g, out);
  }

 private:
  template <int kField>
  [[gnu::always_inline]] void look_up_from(const std::uint8_t* step, __m512i strip, const Group& g,
                                           __m512i (&out)[kFields]) const {
    if constexpr (kField < kFields) {
      out[kField] =
          narrow_two(values<kField>(step, strip, g), values<kFields + kField>(step, strip, g));
      look_up_from<kField + 1>(step, strip, g, out);
    }
  }
  template <int kChunk>
  [[gnu::always_inline]] __m512 values(const std::uint8_t* step, __m512i strip,
                                       const Group& g) const {
    constexpr int kShift = kHigh * kChunk - 4;
    constexpr int kMask = ((1 << kHigh) - 1) << 4;
    __m512i low = VecBf16::load_u8(step + kChunk / 2 * kLanes);
    if constexpr (kChunk % 2 != 0) low = _mm512_srli_epi32(low, 4);
    __m512i high = strip;
    if constexpr (kShift > 0) high = _mm512_srli_epi32(strip, kShift);
    if constexpr (kShift < 0) high = _mm512_slli_epi32(strip, -kShift);
    if constexpr (kChunk % 2 == 0) low = _mm512_and_si512(low, _mm512_set1_epi32(15));
    // low | (high & mask)
    const __m512i code = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(kMask), 0xF8);
    return wide_value<V>(_mm512_sub_ps(_mm512_cvtepi32_ps(code), centre),
                         _mm512_set1_ps(g.stats.scale[g.slot + kChunk]),
                         _mm512_set1_ps(g.stats.offset[g.slot + kChunk]));
  }
};

/// Calls fn.template operator()<Lookup>() with that of a matrix of up to 4 bits of which
/// step_fields is not 0.
template <class Fn>
void with_lookup(const KernelMatrix& w, Fn fn) {
  const bool halves = w.group_size == 16 * fields_of(w.bits);
  const auto width = [&]<int kBits>(Width<kBits> /*bits*/) {
    if (halves) return fn.template operator()<Lookup<kBits, true>>();
    fn.template operator()<Lookup<kBits, false>>();
  };
  if (w.bits == 4) return width(Width<4>{});
  if (w.bits == 3) return width(Width<3>{});
  width(Width<2>{});
}

/// Calls fn.template operator()<Step>() for 5, 6 and 8 bits.
template <class Fn>
void with_numbers(const KernelMatrix& w, Fn fn) {
  with_rule(w, [&]<class V>(V /*rule*/) {
    if (has_planes(w.bits)) {
      if constexpr (V::kOffset == OffsetKind::kOver127)
        return;
      else if (w.bits == 5)
        return fn.template operator()<PlaneStep<V, 5>>();
      else
        return fn.template operator()<PlaneStep<V, 6>>();
    }
    if (w.code_kind == CodeKind::kNumber) {
      return fn.template operator()<NumberStep<V, Reader<VecBf16, 8, CodeKind::kNumber>>>();
    }
    if constexpr (V::kOffset == OffsetKind::kNone) {  // 8-bit floats come without
      fn.template operator()<NumberStep<V, Reader<VecBf16, 8, CodeKind::kE4M3>>>();
    }
  });
}

/// Calls fn(Rule) for up to 4 bits.
template <class Fn>
void with_table_rule(const KernelMatrix& w, Fn fn) {
  with_rule(w, [&]<class V>(V rule) {
    if constexpr (V::kOffset != OffsetKind::kOver127) fn(rule);
  });
}

/// out[r * ld + 16 k + code]: the tables of groups first + k of some rows, 32 bytes each, two
/// groups at a time: one more than there are may be written.
template <class V>
void build_bf16_tables(__m512 codes, const Stretch* stats, std::int64_t rows, std::int64_t first,
                       std::int64_t groups, std::uint16_t* out, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r, out += ld) {
    const float* scale = stats[r].scale + first;
    const float* offset = stats[r].offset + first;
    const auto values = [=](std::int64_t k) {
      return wide_value<V>(codes, _mm512_set1_ps(scale[k]), _mm512_set1_ps(offset[k]));
    };
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < groups; k += 2) {
      _mm512_store_si512(out + k * kLanes, narrow_two(values(k), values(k + 1)));
    }
  }
}
using BuildBf16Tables = void (*)(__m512 codes, const Stretch* stats, std::int64_t rows,
                                 std::int64_t first, std::int64_t groups, std::uint16_t* out,
                                 std::int64_t ld);

inline BuildBf16Tables bf16_table_builder(const KernelMatrix& w) {
  BuildBf16Tables build = nullptr;
  with_table_rule(w, [&]<class V>(V /*rule*/) { build = build_bf16_tables<V>; });
  return build;
}
template <class L>
__m512i load_table(const std::uint16_t* tables) {
  if constexpr (L::kGroupsOfStep == 2) return load_512(tables);
  return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(tables)));
}

// ------------------------------------------------------------------ rows to scratch

/// Columns [col + k, col + k + n) of a row, then zeros up to a multiple of kPadColumns. `stats` is
/// what expand_stretch gave for the columns from `col` on (unused where step_fields is 0); n is a
/// multiple of the step unless the row ends.
using DecodeBf16 = void (*)(const KernelMatrix& w, const Stretch& stats, std::int64_t row,
                            std::int64_t col, std::int64_t k, std::int64_t n, std::uint16_t* out);

inline void pad_columns(std::int64_t n, std::uint16_t* out) {
  for (; n % kPadColumns != 0; ++n) out[n] = 0;
}

inline void decode_any(const KernelMatrix& w, const Stretch& /*stats*/, std::int64_t row,
                       std::int64_t col, std::int64_t k, std::int64_t n, std::uint16_t* out) {
  dequantize_row<VecBf16>(w, FloatKind::kBF16, row, col + k, n,
                          reinterpret_cast<std::uint8_t*>(out));
  pad_columns(n, out);
}

/// One step of codes.
template <class Step>
[[gnu::always_inline]] inline void decode_step(const Step& step, const std::uint8_t* codes,
                                               const typename Step::Group& group,
                                               std::uint16_t* out) {
  __m512i values[Step::kFields];
  step.look_up(codes, group, values);
#pragma GCC unroll 4
  for (int f = 0; f < Step::kFields; ++f) _mm512_storeu_si512(out + 32 * f, values[f]);
}

template <class Step>
void decode_steps(const KernelMatrix& w, const Stretch& stats, std::int64_t row, std::int64_t col,
                  std::int64_t k, std::int64_t n, std::uint16_t* out) {
  const Step step(w);
  const std::uint8_t* codes =
      w.codes + row * w.code_bytes + (col + k) / Step::kColumns * Step::kBytes;
  const std::int64_t slot_size = slot_columns(w);
  const std::int64_t width = slot_size * Step::kGroupsOfStep;  // columns that share a Group
  std::int64_t slot = static_cast<std::uint32_t>(stats.phase + k) /
                      static_cast<std::uint32_t>(slot_size);  // faster than 64 bits
  std::int64_t c = 0;
  if constexpr (requires(typename Step::Group(&pair)[2]) { step.two_groups(stats, slot, pair); }) {
    if (w.group_size == Step::kColumns) {
      for (; c + 2 * Step::kColumns <= n; c += 2 * Step::kColumns, slot += 2) {
        typename Step::Group pair[2];
        step.two_groups(stats, slot, pair);
        decode_step(step, codes, pair[0], out + c);
        decode_step(step, codes + Step::kBytes, pair[1], out + c + Step::kColumns);
        codes += 2 * Step::kBytes;
      }
    }
  }
  std::int64_t end = (slot + Step::kGroupsOfStep) * slot_size - stats.phase - k;
  for (; c < n; slot += Step::kGroupsOfStep, end += width) {
    const typename Step::Group group = step.group(stats, slot);
    for (const std::int64_t stop = min64(end, n); c < stop; c += Step::kColumns) {
      decode_step(step, codes, group, out + c);
      codes += Step::kBytes;
    }
  }
  pad_columns(n, out);
}

inline DecodeBf16 bf16_decoder(const KernelMatrix& w) {
  DecodeBf16 decode = decode_any;
  if (step_fields(w) == 0) return decode;
  if (w.bits > 4) {
    with_numbers(w, [&]<class Step>() { decode = decode_steps<Step>; });
    return decode;
  }
  with_table_rule(w, [&]<class V>(V /*rule*/) {
    with_lookup(w,
                [&]<class L>() { decode = decode_steps<TableStep<V, L, L::kGroupsOfStep == 2>>; });
  });
  return decode;
}

/// Lane j: the sum of the lanes of v[j]. The order is (b0 + b1) + (b2 + b3) over blocks of four
/// lanes, within a block (0 + 2) + (1 + 3).
inline __m128 sum_lanes(const __m512 (&v)[4]) {
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d a = pairs(v[0], v[1]);
  const __m512d b = pairs(v[2], v[3]);
  const __m512 blocks = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const auto fold = [](__m256 h) {
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  };
  return _mm_add_ps(fold(VecBf16::low(blocks)), fold(VecBf16::high(blocks)));
}

}  // namespace
}  // namespace quantal

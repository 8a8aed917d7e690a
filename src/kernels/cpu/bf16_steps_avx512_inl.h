// Steps of codes as bfloat16 values: which matrices have them, in what order columns then stand,
// how codes become values. AVX-512 with BF16 only; included by *_avx512bf16.cpp alone.
//
// Order of columns: with F fields of codes in a byte (below), steps of 32 F columns are 2 F chunks
// of 16, and stand as F vectors of 32: vector f holds chunks f and F + f. That is what lookups
// yield from 32 bytes of codes; F = 1 is the order of memory. Half a step at the end of a row is a
// step of F / 2 fields.
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

/// Fields F of the fast decoders by width, 0 if there is none: a step is 32 bytes of the low plane
/// (64 of 5-bit codes, whose unit is that long).
constexpr int fields_of(int bits) {
  constexpr int kFields[] = {0, 0, 4, 4, 2, 4, 2, 0, 1};
  return kFields[bits];
}
constexpr bool has_planes(int bits) { return bits == 5 || bits == 6; }

/// Fields of the decoder that this matrix gets, 0: any groups, columns in order. Groups are whole
/// chunks (8 bits: whole steps), rows whole steps or half a step more.
inline int step_fields(const KernelMatrix& w) {
  const int fields = fields_of(w.bits);
  if (fields == 0 || w.groups != GroupKind::kRowRuns || w.cols % w.group_size != 0) return 0;
  const std::int64_t end = fields == 1 ? 32 : 16 * fields;
  if (w.group_size % (fields == 1 ? 32 : kLanes) != 0 || w.cols % end != 0) return 0;
  if (w.bits == 8 ? w.code_kind == CodeKind::kE5M2 : w.offset == OffsetKind::kOver127) return 0;
  return fields;
}
/// Fields of the step that holds column `col` of `cols`, the last ones of a row or whole steps.
constexpr std::int64_t fields_at(std::int64_t fields, std::int64_t col, std::int64_t cols) {
  return fields > 1 && cols - col / (32 * fields) * 32 * fields < 32 * fields ? fields / 2 : fields;
}

/// What tables of a step's values there are, of codes of up to 4 bits; step_fields is not 0.
enum class StepTables {
  kOne,     // a group is one or more steps
  kHalves,  // a group is half a step
  kChunks,  // other groups: each chunk has its own
};
inline StepTables tables_of(const KernelMatrix& w) {
  const std::int64_t step = 32 * fields_of(w.bits);
  if ((w.group_size & (step - 1)) == 0) return StepTables::kOne;  // step is a power of two
  return w.group_size == step / 2 ? StepTables::kHalves : StepTables::kChunks;
}

/// Codes of 5 bits whose groups fill tables of 32 values (FiveBitStep).
inline bool has_wide_tables(const KernelMatrix& w) {
  return w.bits == 5 && w.group_size % (2 * kLanes) == 0;
}

/// Columns of a slot of the statistics that steps get: a group or, of 5 and 6 bits and of tables of
/// chunks, one or two chunks.
inline std::int64_t slot_columns(const KernelMatrix& w) {
  if (has_wide_tables(w)) return 2 * kLanes;
  const bool chunks = w.bits <= 4 ? tables_of(w) == StepTables::kChunks : has_planes(w.bits);
  return chunks ? kLanes : w.group_size;
}
/// The same where the step is known.
template <class Step>
std::int64_t slot_columns(const KernelMatrix& w) {
  return Step::kSlotColumns != 0 ? Step::kSlotColumns : w.group_size;
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

/// Codes of 2, 3 or 4 bits, looked up in tables of a group's values: a register holds those of
/// chunks f and F + f in its halves.
template <int kCodeBits, StepTables kStepTables, int kStepFields = fields_of(kCodeBits)>
struct Lookup {
  static constexpr int kBits = kCodeBits;
  static constexpr int kFields = kStepFields;
  static constexpr StepTables kTables = kStepTables;
  static constexpr std::int64_t kSlotColumns =
      kTables == StepTables::kChunks ? kLanes : 0;  // 0: a group
  static constexpr bool kWhole = kFields == fields_of(kBits);
  static constexpr std::int64_t kColumns = 32 * kFields;
  static constexpr std::int64_t kBytes = kColumns * kBits / 8;
  static constexpr std::int64_t kGroupsOfStep = kTables == StepTables::kOne      ? 1
                                                : kTables == StepTables::kHalves ? 2
                                                                                 : 2 * kFields;
  using Half = Lookup<kBits, kTables == StepTables::kChunks ? kTables : StepTables::kOne,
                      kWhole ? kFields / 2 : kFields>;
  struct Group {
    __m512i of[kTables == StepTables::kChunks ? kFields : 1];  // vectors
  };

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
  [[gnu::always_inline]] static void look_up_from(__m512i low, __m512i high, const Group& tables,
                                                  __m512i (&out)[kFields]) {
    if constexpr (kField < kFields) {
      __m512i at = index<kField>(low, high);
      if constexpr (kTables != StepTables::kOne) {  // vpermw reads five bits: the fifth chooses
        const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        at = _mm512_ternarylogic_epi32(at, _mm512_set1_epi16(15), upper, 0xEA);  // (a & b) | c
      }
      constexpr int kTable = kTables == StepTables::kChunks ? kField : 0;
      out[kField] = _mm512_permutexvar_epi16(at, tables.of[kTable]);
      look_up_from<kField + 1>(low, high, tables, out);
    }
  }
  /// Words of 16 bytes, and in the upper half the same shifted to the field of chunk F.
  template <int kShift>
  static __m512i both_halves(const std::uint8_t* from) {
    const __m256i low =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, kShift), 1);
  }
  /// Values of the step whose codes begin at `step`. Nothing is read beyond them but padding.
  [[gnu::always_inline]] static void look_up(const std::uint8_t* step, const Group& tables,
                                             __m512i (&out)[kFields]) {
    __m512i high = _mm512_setzero_si512();
    // Bit c of a byte belongs to chunk c.
    if constexpr (kBits == 3) high = both_halves<kFields>(step + 32);
    if constexpr (kWhole) {
      const auto* low = reinterpret_cast<const __m256i*>(step);
      look_up_from<0>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(low)), high, tables, out);
    } else {
      look_up_from<0>(both_halves<4>(step), high, tables, out);
    }
  }
};

/// Tables from statistics.
template <class V, class L>
struct TableStep : L {
  using Group = typename L::Group;
  using Half = TableStep<V, typename L::Half>;
  __m512 codes;

  explicit TableStep(const KernelMatrix& w) : codes(_mm512_loadu_ps(w.table)) {}

  [[gnu::always_inline]] __m512 values(const Stretch& stats, std::int64_t slot) const {
    return wide_value<V>(codes, _mm512_set1_ps(stats.scale[slot]),
                         _mm512_set1_ps(stats.offset[slot]));
  }
  [[gnu::always_inline]] Group group(const Stretch& stats, std::int64_t slot) const {
    if constexpr (L::kTables == StepTables::kOne) {
      return {{_mm512_broadcast_i64x4(VecBf16::narrow_bf16(values(stats, slot)))}};
    } else if constexpr (L::kTables == StepTables::kHalves) {
      return {{narrow_two(values(stats, slot), values(stats, slot + 1))}};
    } else {
      Group tables;
#pragma GCC unroll 4
      for (int f = 0; f < L::kFields; ++f) {
        tables.of[f] = narrow_two(values(stats, slot + f), values(stats, slot + L::kFields + f));
      }
      return tables;
    }
  }
  /// Those of two steps of one group each: conversions cost most of a table.
  [[gnu::always_inline]] void two_groups(const Stretch& stats, std::int64_t slot,
                                         Group (&out)[2]) const
      requires(L::kTables == StepTables::kOne) {
    const __m512i both = narrow_two(values(stats, slot), values(stats, slot + 1));
    out[0].of[0] = _mm512_shuffle_i64x2(both, both, 0x44);
    out[1].of[0] = _mm512_shuffle_i64x2(both, both, 0xEE);
  }
};

/// 8-bit codes, computed 16 at a time.
template <class V, class R>
struct NumberStep {
  static constexpr int kFields = 1;
  static constexpr std::int64_t kColumns = 32;
  static constexpr std::int64_t kBytes = 32;
  static constexpr std::int64_t kGroupsOfStep = 1;
  static constexpr std::int64_t kSlotColumns = 0;
  using Half = NumberStep;  // there is none
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
template <class V, int kCodeBits, int kStepFields = fields_of(kCodeBits)>
struct PlaneStep {
  static constexpr int kFields = kStepFields;
  static constexpr std::int64_t kColumns = 32 * kFields;
  static constexpr std::int64_t kBytes = kColumns * kCodeBits / 8;
  static constexpr std::int64_t kGroupsOfStep = kColumns / kLanes;
  static constexpr std::int64_t kSlotColumns = kLanes;
  static constexpr int kHigh = Planes<kCodeBits>::kHigh;
  using Half = PlaneStep<V, kCodeBits, fields_of(kCodeBits) / 2>;
  struct Group {
    const Stretch& stats;
    std::int64_t slot;  // of the first chunk
  };
  __m512 centre;

  explicit PlaneStep(const KernelMatrix& w) : centre(_mm512_set1_ps(w.centre)) {}
  static Group group(const Stretch& stats, std::int64_t slot) { return {stats, slot}; }
  [[gnu::always_inline]] void look_up(const std::uint8_t* step, const Group& g,
                                      __m512i (&out)[kFields]) const {
    look_up_from<0>(step, VecBf16::load_u8(step + Planes<kCodeBits>::kLowBytes), g, out);
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

/// Codes of 5 bits in groups of 32 columns or multiples: the 32 values of a group fill a register,
/// so the tables of the groups of chunks f and F + f are one lookup in two registers.
template <class V, int kStepFields = fields_of(5)>
struct FiveBitStep {
  static constexpr int kFields = kStepFields;
  static constexpr std::int64_t kColumns = 32 * kFields;
  static constexpr std::int64_t kBytes = kColumns * 5 / 8;
  static constexpr std::int64_t kGroupsOfStep = kColumns / 32;
  static constexpr std::int64_t kSlotColumns = 2 * kLanes;
  using Half = FiveBitStep<V, fields_of(5) / 2>;
  using Group = typename PlaneStep<V, 5>::Group;
  __m512 first, second;  // codes 0 to 15 and 16 to 31

  explicit FiveBitStep(const KernelMatrix& w)
      : first(_mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                            _mm512_set1_ps(w.centre))),
        second(_mm512_sub_ps(
            _mm512_setr_ps(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
            _mm512_set1_ps(w.centre))) {}
  static Group group(const Stretch& stats, std::int64_t slot) { return {stats, slot}; }

  [[gnu::always_inline]] void look_up(const std::uint8_t* step, const Group& g,
                                      __m512i (&out)[kFields]) const {
    const __m256i strip = _mm256_cvtepu8_epi16(strip_at(step + Planes<5>::kLowBytes));
    const __m512i high =
        _mm512_inserti64x4(_mm512_castsi256_si512(strip), _mm256_srli_epi16(strip, kFields), 1);
    look_up_from<0>(step, high, g, out);
  }

 private:
  static __m128i strip_at(const std::uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  __m512i table(const Group& g, int slot) const {
    const __m512 s = _mm512_set1_ps(g.stats.scale[g.slot + slot]);
    const __m512 o = _mm512_set1_ps(g.stats.offset[g.slot + slot]);
    return narrow_two(wide_value<V>(first, s, o), wide_value<V>(second, s, o));
  }
  /// Fields kField and kField + 1: those chunks share strips of the low plane and groups.
  template <int kField>
  [[gnu::always_inline]] void look_up_from(const std::uint8_t* step, __m512i high, const Group& g,
                                           __m512i (&out)[kFields]) const {
    if constexpr (kField < kFields) {
      const std::uint8_t* strip = step + kField / 2 * kLanes;
      const __m512i low = _mm512_cvtepu8_epi16(_mm256_inserti128_si256(
          _mm256_castsi128_si256(strip_at(strip)), strip_at(strip + kFields / 2 * kLanes), 1));
      const __m512i lower = table(g, kField / 2);
      const __m512i upper = table(g, (kFields + kField) / 2);
      out[kField] =
          _mm512_permutex2var_epi16(lower, index(low, _mm512_slli_epi16(high, 4 - kField)), upper);
      out[kField + 1] = _mm512_permutex2var_epi16(
          lower, index(_mm512_srli_epi16(low, 4), _mm512_slli_epi16(high, 3 - kField)), upper);
      look_up_from<kField + 2>(step, high, g, out);
    }
  }
  /// Four bits of `low`, the fifth of `high`, and the sixth for the second register in upper lanes.
  static __m512i index(__m512i low, __m512i high) {
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(32), 1);
    const __m512i code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, high, 0xCA);
    return _mm512_ternarylogic_epi32(code, _mm512_set1_epi16(31), second, 0xEA);
  }
};

/// Calls fn.template operator()<Lookup>() with that of a matrix of up to 4 bits of which
/// step_fields is not 0.
template <class Fn>
void with_lookup(const KernelMatrix& w, Fn fn) {
  const auto width = [&]<int kBits>(Width<kBits> /*bits*/) {
    switch (tables_of(w)) {
      case StepTables::kOne:
        return fn.template operator()<Lookup<kBits, StepTables::kOne>>();
      case StepTables::kHalves:
        return fn.template operator()<Lookup<kBits, StepTables::kHalves>>();
      case StepTables::kChunks:
        return fn.template operator()<Lookup<kBits, StepTables::kChunks>>();
    }
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
      else if (has_wide_tables(w))
        return fn.template operator()<FiveBitStep<V>>();
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

}  // namespace
}  // namespace quantal

// Units of codes for sums to which scales are applied afterwards (sums_avx512bf16.cpp): which
// matrices have them, in what order columns stand, what bfloat16 stands for a code. AVX-512 with
// BF16 only.
//
// A unit is 64 bytes of low planes and what goes with them, as 32 words. With F fields of codes in
// a byte, its quarters of 16 bytes are F chunks of 16 columns each. Vector b F + f holds, of each
// quarter, chunk f in columns b, b + 2, ..: what word lanes yield from byte b, field f. So a
// quarter of all lanes is 16 F consecutive columns, whatever the vector.
#pragma once

#include "kernels/cpu/bf16_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr int sum_fields(int bits) {
  constexpr int kFields[] = {0,
                             0,
                             Planes<2>::kFields,
                             Planes<3>::kFields,
                             Planes<4>::kFields,
                             Planes<5>::kFields,
                             Planes<6>::kFields,
                             0,
                             Planes<8>::kFields};
  return kFields[bits];
}
/// Columns that share a quarter of the lanes in all vectors.
constexpr std::int64_t quarter_columns(int bits) { return 16 * sum_fields(bits); }
constexpr std::int64_t unit_columns(int bits) { return 4 * quarter_columns(bits); }

/// True if scales can wait for sums of codes: integers and tables, rows that begin with a group.
/// Integers up to 255 are exact in bfloat16.
inline bool has_sum_units(const KernelMatrix& w) {
  return w.groups == GroupKind::kRowRuns && sum_fields(w.bits) != 0 && w.cols % kLanes == 0 &&
         w.group_size % kLanes == 0 && w.cols % w.group_size == 0 &&
         (w.bits <= 4 || (w.code_kind == CodeKind::kNumber && w.centre >= 0 && w.centre <= 255));
}
/// True if chunks of a quarter belong to several groups.
inline bool has_chunk_groups(const KernelMatrix& w) {
  return w.group_size % quarter_columns(w.bits) != 0;
}
/// Columns of a slot of the statistics: a group where that is 2^k quarters, else a quarter or a
/// chunk, which then have their group's.
inline std::int64_t sum_slot_columns(const KernelMatrix& w) {
  if (has_chunk_groups(w)) return kLanes;
  const std::int64_t quarter = quarter_columns(w.bits);
  const std::int64_t quarters = w.group_size / quarter;
  const bool whole = (quarters & (quarters - 1)) == 0 && w.group_size <= kSumColumns;
  return whole ? w.group_size : quarter;
}

template <int kCodeBits>
class SumUnit {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr int kFields = sum_fields(kBits);
  static constexpr std::int64_t kColumns = unit_columns(kBits);
  static constexpr std::int64_t kBytes = kColumns * kBits / 8;
  /// Vectors of 32 codes; of 8 bits, halves of codes, two for a vector of activations.
  static constexpr int kVectors = kBits == 8 ? 4 : 2 * kFields;
  static constexpr int input_of(int vector) { return kBits == 8 ? vector / 2 : vector; }
  static constexpr int field_of(int vector) { return kBits == 8 ? 0 : vector % kFields; }

  struct Codes {
    __m512i low, high;
  };

  /// Tables: what a code stands for before its scale, rounded to bfloat16; integers are exact.
  explicit SumUnit(const KernelMatrix& w) {
    alignas(64) std::uint16_t values[64];
    for (int i = 0; i < 64; ++i) values[i] = f32_bits_to_bf16(value_of(w, i));
    first_ = load_512(values);
    second_ = load_512(values + 32);
  }

  /// The unit at `p`; kTail: of which `bytes` are left in the row.
  template <bool kTail>
  [[gnu::always_inline]] static Codes load(const std::uint8_t* p, std::int64_t bytes) {
    if constexpr (kBits == 5) return {load_512(p), strips(p + 64, p + 64)};
    if constexpr (kBits == 3 || kBits == 6) {
      // Two steps of 32 bytes and a strip; a tail is the first.
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const std::uint8_t* next = kTail && bytes < kBytes ? p : p + kBytes / 2;
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
      return {_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1),
              strips(p + 32, next + 32)};
    }
    if constexpr (kTail) {
      const auto mask = bytes < 64 ? (__mmask64{1} << bytes) - 1 : ~__mmask64{0};
      return {_mm512_maskz_loadu_epi8(mask, p), _mm512_setzero_si512()};
    }
    return {load_512(p), _mm512_setzero_si512()};
  }

  template <int kVector>
  [[gnu::always_inline]] __m512i values(const Codes& codes) const {
    if constexpr (kBits == 8) {
      return _mm512_permutexvar_epi16(right<4 * kVector>(codes.low),
                                      kVector % 2 == 0 ? first_ : second_);
    } else {
      constexpr int kByte = 8 * (kVector / kFields);
      constexpr int kField = kVector % kFields;
      constexpr int kLow = Planes<kBits>::kLow;
      constexpr int kHigh = Planes<kBits>::kHigh;
      __m512i at = right<kByte + kLow * kField>(codes.low);
      if constexpr (kHigh != 0) {
        const __m512i high = right<kByte + kHigh * kField - kLow>(codes.high);
        at = _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << kLow) - 1), at, high, 0xCA);
      }
      if constexpr (kBits == 6) return _mm512_permutex2var_epi16(first_, at, second_);
      return _mm512_permutexvar_epi16(at, first_);  // reads five bits of each word
    }
  }

 private:
  template <int kShift>
  static __m512i right(__m512i v) {
    if constexpr (kShift > 0) return _mm512_srli_epi16(v, kShift);
    if constexpr (kShift < 0) return _mm512_slli_epi16(v, -kShift);
    return v;
  }
  /// High strips, those of each quarter's chunks in the low bits of its bytes: half of the quarters
  /// from each.
  static __m512i strips(const std::uint8_t* a, const std::uint8_t* b) {
    const auto strip = [](const std::uint8_t* p) {
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    };
    const __m512i both = kBits == 5 ? strip(a) : _mm512_mask_mov_epi64(strip(a), 0xF0, strip(b));
    const auto shift = [](int quarter) {
      constexpr int kSize = Planes<kBits>::kHigh * kFields;  // bits of a quarter's chunks
      return static_cast<std::int64_t>(kBits == 5 ? quarter : quarter % 2) * kSize *
             0x0001000100010001;
    };
    const __m512i by = _mm512_setr_epi64(shift(0), shift(0), shift(1), shift(1), shift(2), shift(2),
                                         shift(3), shift(3));
    return _mm512_srlv_epi16(both, by);
  }
  /// Entry i of the tables: narrow codes repeat; of 8 bits the low halves, then the high ones.
  static float value_of(const KernelMatrix& w, int i) {
    if constexpr (kBits <= 4) return w.table[i % (1 << kBits)];
    if constexpr (kBits == 8) {
      return i < 32 ? static_cast<float>(i % 16) : static_cast<float>(i % 16 * 16) - w.centre;
    }
    return static_cast<float>(i % (1 << kBits)) - w.centre;
  }
  static std::uint16_t f32_bits_to_bf16(float v) {
    return static_cast<std::uint16_t>(
        _mm_extract_epi16(reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_set_ss(v))), 0));
  }

  __m512i first_, second_;
};

// ------------------------------------------------------------------ activations

/// True if offsets are multiplied with sums of activations.
inline bool has_sums_of_inputs(const KernelMatrix& w) {
  return w.offset != OffsetKind::kNone && w.offset != OffsetKind::kOver127;
}

/// Lanes of `v` added up in each quarter, to[0], to[step], ..
inline void store_quarters(__m512 v, std::int64_t step, float* to) {
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4E));
  alignas(16) float of[4];
  _mm_store_ps(of, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v)));
  for (int q = 0; q < 4; ++q) to[q * step] = of[q];
}

/// Columns of chunk f of the quarters of a unit, `left` of which are in the row: even ones, odd.
struct ChunkPair {
  __m512i even, odd;

  ChunkPair(const std::uint16_t* in, std::int64_t quarter, std::int64_t left) {
    const auto chunk = [=](int q) {
      if (q * quarter >= left) return _mm256_setzero_si256();
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + q * quarter));
    };
    const auto both = [](__m256i low, __m256i high) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const __m512i low = both(chunk(0), chunk(1));
    const __m512i high = both(chunk(2), chunk(3));
    // Words 0, 2, ..: 4 i and 4 i + 2 in lane i.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i even_at = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x40004)),
                                             _mm512_set1_epi32(0x20000));
    even = _mm512_permutex2var_epi16(low, even_at, high);
    odd = _mm512_permutex2var_epi16(low, _mm512_add_epi16(even_at, _mm512_set1_epi16(1)), high);
  }
};

// ------------------------------------------------------------------ choice

/// Calls fn.template operator()<SumUnit>() for a matrix that has_sum_units.
template <class Fn>
void with_sum_unit(const KernelMatrix& w, Fn fn) {
  switch (w.bits) {
    case 2:
      return fn.template operator()<SumUnit<2>>();
    case 3:
      return fn.template operator()<SumUnit<3>>();
    case 4:
      return fn.template operator()<SumUnit<4>>();
    case 5:
      return fn.template operator()<SumUnit<5>>();
    case 6:
      return fn.template operator()<SumUnit<6>>();
    default:
      return fn.template operator()<SumUnit<8>>();
  }
}

}  // namespace
}  // namespace quantal

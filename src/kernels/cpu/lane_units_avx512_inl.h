// Codes of 16 weight rows at a time for products in which a lane is a row (lanes_avx512bf16.cpp).
// AVX-512 with BF16 only.
//
// Units are those of sums (sum_units_avx512_inl.h). Each row's is transposed while it is packed: a
// vector holds word d of 16 rows, and what vector v of a unit takes from word d is a pair of
// columns.
#pragma once

#include "kernels/cpu/sum_units_avx512_inl.h"
#include "kernels/cpu/transpose_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr int kLaneVecs = 2;  // of rows that stand together
constexpr std::int64_t kLaneRows = kLaneVecs * kLanes;
constexpr int kQuarterWords = 4;
constexpr int kUnitWords = 4 * kQuarterWords;  // of the low plane

template <int kCodeBits>
class LaneUnit {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr int kFields = sum_fields(kBits);
  static constexpr int kPairs = 2 * kFields;  // of columns in a word
  static constexpr std::int64_t kColumns = unit_columns(kBits);
  static constexpr std::int64_t kBytes = kColumns * kBits / 8;
  static constexpr int kStrips = Planes<kBits>::kHigh == 0 ? 0 : kBits == 5 ? 1 : 2;
  static constexpr int kWords = kUnitWords + kStrips * kQuarterWords;  // of both planes

  explicit LaneUnit(const KernelMatrix& w)
      : tables_(w), to_number_(_mm512_set1_ps(0x1p23F + w.centre)) {}

  /// Pair kPair of a word, with its bits of the high plane (LaneCodes::low, high).
  template <int kPair>
  [[gnu::always_inline]] __m512i values(__m512i low, __m512i high) const {
    if constexpr (kBits == 8) {
      return _mm512_or_si512(_mm512_srli_epi32(number<8 * kPair>(low), 16),
                             number<8 * kPair + 16>(low));
    } else {
      return tables_.template values<kPair>({low, high});
    }
  }
  /// Where word d's bits of the high plane are, and how far they are to be shifted.
  static constexpr int high_word(int d) {
    return kUnitWords + (kStrips == 2 ? d / (2 * kQuarterWords) : 0) * kQuarterWords +
           d % kQuarterWords;
  }
  static constexpr int high_shift(int d) {
    constexpr int kSize = Planes<kBits>::kHigh * kFields;  // bits of a quarter's chunks
    const int quarter = d / kQuarterWords;
    return (kStrips == 2 ? quarter % 2 : quarter) * kSize;
  }

 private:
  /// Byte kAt / 8 of each lane minus the centre, a float32 whose low half is 0.
  template <int kAt>
  [[gnu::always_inline]] __m512i number(__m512i word) const {
    const __m512i biased = _mm512_ternarylogic_epi32(
        _mm512_srli_epi32(word, kAt), _mm512_set1_epi32(0xFF), _mm512_set1_epi32(0x4B000000), 0xEA);
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(biased), to_number_));
  }

  const SumUnit<kBits> tables_;
  const __m512 to_number_;  // 2^23, under which a code stands in the mantissa, and the centre
};

/// Units of kLaneRows rows: those that are multiplied, and the next ones, which are copied
/// row by row in the meantime. Rows are powers of two apart, so lines of many rows would not stay
/// in the first-level cache until they are transposed.
template <class Unit>
class LaneCodes {
 public:
  LaneCodes(const KernelMatrix& w, std::int64_t row_end) : w_(w), end_(row_end) {}

  /// The next unit is that of columns from `col` on of rows from `row` on, if there are any.
  void aim(std::int64_t row, std::int64_t col) {
    left_ = row < end_ ? kLaneRows : 0;
    const std::int64_t offset = col / Unit::kColumns * Unit::kBytes;
    from_ = w_.codes + row * w_.code_bytes + offset;
    last_ = w_.codes + (end_ - 1) * w_.code_bytes + offset;
    const std::int64_t bytes = w_.code_bytes - offset;
    whole_ = bytes >= Unit::kBytes;
    mask_ = bytes < 64 ? (__mmask64{1} << bytes) - 1 : ~__mmask64{0};
    to_ = 0;
  }
  /// Copies kLaneVecs rows of the next unit.
  [[gnu::always_inline]] void copy() {
    if (left_ == 0) return;
#pragma GCC unroll 2
    for (int i = 0; i < kLaneVecs; ++i) {
      copy_row();
      if (first_) _mm_prefetch(reinterpret_cast<const char*>(from_) + kFirstAhead, _MM_HINT_T0);
      from_ = from_ < last_ ? from_ + w_.code_bytes : last_;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLaneVecs * Unit::kBytes; i += 64) _mm_prefetch(ahead_ + i, _MM_HINT_T0);
    ahead_ += kLaneVecs * Unit::kBytes;
    left_ -= kLaneVecs;
  }
  void copy_rest() {
    while (left_ != 0) copy();
  }
  /// Begins with rows from `row` on: nothing has asked for them.
  void begin(std::int64_t row) {
    for (std::int64_t r = row; r < min64(row + kLaneRows, end_); ++r) {
      const char* codes = reinterpret_cast<const char*>(w_.codes + r * w_.code_bytes);
      for (std::int64_t i = 0; i < kFirstAhead; i += 64) _mm_prefetch(codes + i, _MM_HINT_T0);
    }
    ask_from(row);
    aim(row, 0);
    copy_rest();
    ask_from(row + kLaneRows);
    first_ = true;
  }
  /// What is asked for while codes are copied: rows from `row` on, in the order of memory.
  void ask_from(std::int64_t row) {
    first_ = false;
    ahead_ = reinterpret_cast<const char*>(w_.codes + min64(row, end_) * w_.code_bytes);
  }

  /// Makes the next unit the one that is multiplied.
  void transpose() {
    for (int v = 0; v < kLaneVecs; ++v) {
      const std::uint8_t* raw = raw_ + v * kLanes * kRowBytes;
      __m512i a[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) a[r] = load_512(raw + r * kRowBytes);
      transpose_16(a, [&](int i, __m512i word) { store_word(i, v, word); });
      if constexpr (Unit::kStrips != 0) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          a[r] = _mm512_castsi256_si512(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw + r * kRowBytes + 64)));
        }
        transpose_16(a, [&](int i, __m512i word) {
          if (i < Unit::kStrips * kQuarterWords) store_word(kUnitWords + i, v, word);
        });
      }
    }
  }
  /// Word d of vector v of rows.
  [[gnu::always_inline]] __m512i low(int d, int v) const {
    return load_512(words_ + (d * kLaneVecs + v) * kLanes);
  }
  [[gnu::always_inline]] __m512i high(int d, int v) const {
    if constexpr (Unit::kStrips == 0) return _mm512_setzero_si512();
    return _mm512_srl_epi16(low(Unit::high_word(d), v), _mm_cvtsi32_si128(Unit::high_shift(d)));
  }

 private:
  static constexpr std::int64_t kFirstAhead = 256;  // of each row
  static constexpr int kRowBytes = Unit::kStrips == 0 ? 64 : 128;

  [[gnu::always_inline]] void copy_row() {
    std::uint8_t* to = raw_ + to_;
    to_ += kRowBytes;
    if constexpr (Unit::kStrips == 0) {
      _mm512_store_si512(to, _mm512_maskz_loadu_epi8(mask_, from_));
    } else if constexpr (Unit::kStrips == 1) {
      _mm512_store_si512(to, load_512(from_));
      copy_bytes<16>(from_ + 64, to + 64);
    } else {  // two steps of 32 bytes and a strip; the end of a row may be one
      const std::uint8_t* second = whole_ ? from_ + Unit::kBytes / 2 : from_;
      copy_bytes<32>(from_, to);
      copy_bytes<32>(second, to + 32);
      copy_bytes<16>(from_ + 32, to + 64);
      copy_bytes<16>(second + 32, to + 80);
    }
  }
  template <int kCount>
  static void copy_bytes(const std::uint8_t* from, std::uint8_t* to) {
    __builtin_memcpy(to, from, kCount);
  }
  void store_word(int d, int v, __m512i word) {
    _mm512_store_si512(words_ + (d * kLaneVecs + v) * kLanes, word);
  }

  const KernelMatrix& w_;
  const std::int64_t end_;
  const std::uint8_t* from_ = nullptr;
  const std::uint8_t* last_ = nullptr;
  const char* ahead_ = nullptr;
  std::int64_t left_ = 0, to_ = 0;
  __mmask64 mask_ = 0;
  bool whole_ = true;
  bool first_ = false;  // of the rows that are asked for while they are used
  alignas(64) std::uint8_t raw_[kLaneRows * kRowBytes] = {};
  alignas(64) std::int32_t words_[Unit::kWords * kLaneRows];
};

}  // namespace
}  // namespace quantal

// Products of one to kMaxSumInputs rows of bfloat16 activations, which memory limits: scales and
// offsets are applied to sums over columns that share them (slots),
//
//   y[m, n] = sum over slots of scale * sum_k level(code(n, k)) x[m, k] + offset * sum_k x[m, k]
//
// so that a code costs a lookup in one fixed table and a product. In each kSumColumns columns lanes
// add up in the order of units, offsets after them; then as in other products (sum_lanes).
#include "kernels/cpu/sum_units_avx512_inl.h"

namespace quantal {
namespace {

constexpr int kSumRows = 4;
/// Codes are asked for this long before their use, in the order of memory.
constexpr std::int64_t kAheadBytes = 16 * 1024;

/// Packed activations: whole units of columns, then float32 sums of the columns of each slot and a
/// vector of zeros.
struct PackedInput {
  std::int64_t columns, slots;

  explicit PackedInput(const KernelMatrix& w)
      : columns((w.cols + unit_columns(w.bits) - 1) / unit_columns(w.bits) * unit_columns(w.bits)),
        slots((columns + sum_slot_columns(w) - 1) / sum_slot_columns(w)) {}
  /// In elements of activations; sums of all quarters or chunks stand there on their way.
  std::int64_t width() const { return columns + 2 * (columns / kLanes + kLanes); }
  float* sums(std::uint16_t* packed) const { return reinterpret_cast<float*>(packed + columns); }
  const float* sums(const std::uint16_t* packed) const {
    return reinterpret_cast<const float*>(packed + columns);
  }
};

template <class Unit, bool kChunks>
class SumProduct {
 public:
  SumProduct(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_end)
      : w_(w),
        job_(job),
        unit_(w),
        input_(w),
        slot_(sum_slot_columns(w)),
        end_(w.codes + row_end * w.code_bytes) {
    const std::int64_t quarters = kChunks ? 1 : slot_ / quarter_columns(w.bits);
    while ((std::int64_t{1} << quarters_) < quarters) ++quarters_;
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    spread_ = kChunks ? _mm512_mullo_epi32(quarter, _mm512_set1_epi32(kParts))
                      : _mm512_srl_epi32(quarter, _mm_cvtsi64_si128(quarters_));
  }

  void run(std::int64_t row, std::int64_t row_end) {
    constexpr decltype(&SumProduct::rows<1, 1>) kOf[] = {
        &SumProduct::rows<rows_of(1), 1>, &SumProduct::rows<rows_of(2), 2>,
        &SumProduct::rows<rows_of(3), 3>, &SumProduct::rows<rows_of(4), 4>};
    constexpr decltype(&SumProduct::rows<1, 1>) kSingle[] = {
        &SumProduct::rows<1, 1>, &SumProduct::rows<1, 2>, &SumProduct::rows<1, 3>,
        &SumProduct::rows<1, 4>};
    static_assert(sizeof(kOf) == kMaxSumInputs * sizeof(kOf[0]));
    const std::int64_t together = rows_of(static_cast<int>(job_.inputs));
    const std::int64_t rows_ahead = kAheadBytes / w_.code_bytes + kSumRows;
    ask_for_stats(w_, row, min64(rows_ahead, row_end - row));
    const std::uint8_t* first = w_.codes + row * w_.code_bytes;
    for (ahead_ = first; ahead_ < first + kAheadBytes && ahead_ < end_;) ask<kSumRows>();
    for (; row + together <= row_end; row += together) {
      ahead_ = w_.codes + row * w_.code_bytes + kAheadBytes;
      if (row + rows_ahead < row_end) ask_for_stats(w_, row + rows_ahead, kSumRows);
      (this->*kOf[job_.inputs - 1])(row);
    }
    for (; row < row_end; ++row) (this->*kSingle[job_.inputs - 1])(row);
  }

 private:
  static constexpr int kParts = kChunks ? Unit::kFields : 1;  // slots of a quarter
  /// Weight rows whose sums stand in registers, and those that share a load of activations.
  static constexpr int together_of(int inputs) { return inputs < 3 || Unit::kBits == 8 ? 1 : 2; }
  static constexpr int rows_of(int inputs) {
    return inputs < 4 || together_of(inputs) == 1 ? kSumRows : 2;
  }

  template <int kInputs, int kTogether>
  struct Block {
    typename Unit::Codes codes[kTogether];
    __m512 parts[kInputs][kTogether][kParts];
  };
  template <int kRows, int kInputs>
  struct Sums {
    __m512 of[kInputs][kRows];
  };

  template <int kRows, int kInputs>
  void rows(std::int64_t row) {
    float totals[kInputs][kSumRows] = {};
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      for (int r = 0; r < kRows; ++r) expand(row + r, c, n, stats_[r]);
      Sums<kRows, kInputs> sums;
      units<kRows, kInputs>(row, c, n, sums);
      add_offsets(c, n, sums);
      for (int m = 0; m < kInputs; ++m) {
        __m512 of_rows[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                             _mm512_setzero_ps()};
        for (int r = 0; r < kRows; ++r) of_rows[r] = sums.of[m][r];
        _mm_storeu_ps(totals[m], _mm_add_ps(_mm_loadu_ps(totals[m]), sum_lanes(of_rows)));
      }
    }
    for (int m = 0; m < kInputs; ++m) store_outputs(job_, totals[m], m, row, kRows);
  }

  std::int64_t slots_of(std::int64_t columns) const {
    return static_cast<std::uint32_t>(columns + slot_ - 1) / static_cast<std::uint32_t>(slot_);
  }

  /// Statistics by slots, scales 0 in the slots of a last unit that the row doesn't fill.
  void expand(std::int64_t row, std::int64_t col, std::int64_t n, Stretch& out) const {
    expand_slots(w_, slot_, row, col, n, out);
    const std::int64_t slots = slots_of(n);
    _mm512_storeu_ps(out.scale + slots, _mm512_setzero_ps());
    if (w_.offset != OffsetKind::kOver127) return;
    for (std::int64_t k = 0; k < slots; k += kLanes) {
      const __m512 scale = _mm512_loadu_ps(out.scale + k);
      _mm512_storeu_ps(out.scale + k, _mm512_mul_ps(scale, _mm512_set1_ps(kOneOver127)));
    }
  }

  template <int kRows, int kInputs>
  [[gnu::noinline]] void units(std::int64_t row, std::int64_t col, std::int64_t n,
                               Sums<kRows, kInputs>& out) {
    const std::int64_t first = col / Unit::kColumns * Unit::kBytes;
    const std::uint8_t* codes = w_.codes + row * w_.code_bytes + first;
    const std::uint16_t* x = job_.x + col;
    Sums<kRows, kInputs> sums;
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kInputs; ++i) {
      sums.of[i / kRows][i % kRows] = _mm512_setzero_ps();
    }
    std::int64_t quarter = 0;
    const std::int64_t whole = n - n % Unit::kColumns;
    for (std::int64_t k = 0; k < whole; k += Unit::kColumns, quarter += 4) {
      if constexpr (kRows > 1) ask<kRows>();
      add_unit<false>(codes, Unit::kBytes, x, slot_at(quarter), sums);
      codes += Unit::kBytes;
      x += Unit::kColumns;
    }
    if (whole < n) {
      if constexpr (kRows > 1) ask<kRows>();
      const std::int64_t left = w_.code_bytes - first - whole / Unit::kColumns * Unit::kBytes;
      add_unit<true>(codes, left, x, slot_at(quarter), sums);
    }
    out = sums;
  }
  std::int64_t slot_at(std::int64_t quarter) const {
    return kChunks ? quarter * kParts : quarter >> quarters_;
  }

  template <bool kTail, int kRows, int kInputs>
  [[gnu::always_inline]] void add_unit(const std::uint8_t* codes, std::int64_t bytes,
                                       const std::uint16_t* x, std::int64_t slot,
                                       Sums<kRows, kInputs>& sums) const {
    constexpr int kTogether = together_of(kInputs) < kRows ? together_of(kInputs) : kRows;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += kTogether) {
      Block<kInputs, kTogether> block;
#pragma GCC unroll 2
      for (int t = 0; t < kTogether; ++t) {
        block.codes[t] = Unit::template load<kTail>(codes + (r + t) * w_.code_bytes, bytes);
      }
#pragma GCC unroll 32
      for (int i = 0; i < kInputs * kTogether * kParts; ++i) {
        block.parts[i / kParts / kTogether][i / kParts % kTogether][i % kParts] =
            _mm512_setzero_ps();
      }
      add_vectors<0>(x, block);
#pragma GCC unroll 8
      for (int i = 0; i < kTogether * kParts; ++i) {
        const int t = i / kParts, p = i % kParts;
        const __m512 scale = scales(stats_[r + t].scale + slot, p);
#pragma GCC unroll 4
        for (int m = 0; m < kInputs; ++m) {
          sums.of[m][r + t] = _mm512_fmadd_ps(block.parts[m][t][p], scale, sums.of[m][r + t]);
        }
      }
    }
  }

  template <int kVector, int kInputs, int kTogether>
  [[gnu::always_inline]] void add_vectors(const std::uint16_t* x,
                                          Block<kInputs, kTogether>& block) const {
    if constexpr (kVector < Unit::kVectors) {
      constexpr int kPart = kChunks ? Unit::field_of(kVector) : 0;
      __m512i values[kTogether];
#pragma GCC unroll 2
      for (int t = 0; t < kTogether; ++t) {
        values[t] = unit_.template values<kVector>(block.codes[t]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kInputs; ++m) {
        const __m512i input = load_512(x + m * job_.ldx + 32 * Unit::input_of(kVector));
#pragma GCC unroll 2
        for (int t = 0; t < kTogether; ++t) {
          add_products(block.parts[m][t][kPart], values[t], input);
        }
      }
      add_vectors<kVector + 1>(x, block);
    }
  }

  /// Those of part p of each quarter, in all its lanes.
  [[gnu::always_inline]] __m512 scales(const float* slots, int p) const {
    if constexpr (kParts == 1) {
      return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(slots)), spread_);
    } else {
      return _mm512_permutexvar_ps(_mm512_add_epi32(spread_, _mm512_set1_epi32(p)),
                                   _mm512_loadu_ps(slots));
    }
  }

  template <int kRows, int kInputs>
  void add_offsets(std::int64_t col, std::int64_t n, Sums<kRows, kInputs>& sums) const {
    with_stored_offset(w_.offset, [&](auto offset) {
      constexpr OffsetKind kOffset = decltype(offset)::kKind;
      if constexpr (kOffset != OffsetKind::kNone) add_offsets<kOffset>(col, n, sums);
    });
  }
  template <OffsetKind kOffset, int kRows, int kInputs>
  [[gnu::noinline]] void add_offsets(std::int64_t col, std::int64_t n,
                                     Sums<kRows, kInputs>& out) const {
    const std::int64_t slots = slots_of(n);
    const float* of_x = input_.sums(job_.x) + col / slot_;
    Sums<kRows, kInputs> sums = out;
    for (std::int64_t k = 0; k < slots; k += kLanes, of_x += kLanes) {
      const __mmask16 mask = VecAvx512::first(static_cast<int>(min64(kLanes, slots - k)));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512 offset = _mm512_maskz_loadu_ps(mask, stats_[r].offset + k);
        if constexpr (kOffset == OffsetKind::kZeroPoint) {
          offset = _mm512_mul_ps(offset, _mm512_maskz_loadu_ps(mask, stats_[r].scale + k));
        }
#pragma GCC unroll 4
        for (int m = 0; m < kInputs; ++m) {
          const __m512 input = _mm512_loadu_ps(of_x + m * job_.ldx / 2);
          sums.of[m][r] = kOffset == OffsetKind::kBias
                              ? _mm512_fmadd_ps(offset, input, sums.of[m][r])
                              : _mm512_fnmadd_ps(offset, input, sums.of[m][r]);
        }
      }
    }
    out = sums;
  }

  template <int kRows>
  [[gnu::always_inline]] void ask() {
    if (ahead_ >= end_) return;
#pragma GCC unroll 8
    for (int i = 0; i < kRows * Unit::kBytes; i += 64) __builtin_prefetch(ahead_ + i);
    ahead_ += kRows * Unit::kBytes;
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const Unit unit_;
  const PackedInput input_;
  const std::int64_t slot_;  // columns
  int quarters_ = 0;         // a slot is 2^quarters_ quarters
  __m512i spread_;
  const std::uint8_t* ahead_ = nullptr;
  const std::uint8_t* const end_;
  Stretch stats_[kSumRows];
};

}  // namespace

std::int64_t sums_width_avx512bf16(const KernelMatrix& w) noexcept {
  return PackedInput(w).width();
}
bool has_sums_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept {
  return inputs <= kMaxSumInputs && has_sum_units(w);
}

void pack_sums_avx512bf16(const KernelMatrix& w, const std::uint16_t* in,
                          std::uint16_t* out) noexcept {
  const int fields = sum_fields(w.bits);
  const std::int64_t quarter = quarter_columns(w.bits);
  const PackedInput packed(w);
  const bool chunks = has_chunk_groups(w);
  const bool sums = has_sums_of_inputs(w);
  const __m512i ones = _mm512_set1_epi16(0x3F80);
  float* to = packed.sums(out);
  for (std::int64_t c = 0; c < packed.columns; c += 4 * quarter) {
    __m512 sum = _mm512_setzero_ps();
    for (int f = 0; f < fields; ++f) {
      const ChunkPair pair(in + c + f * kLanes, quarter, w.cols - c - f * kLanes);
      _mm512_storeu_si512(out + c + 32 * f, pair.even);
      _mm512_storeu_si512(out + c + 32 * (fields + f), pair.odd);
      if (!sums) continue;
      if (chunks) sum = _mm512_setzero_ps();
      add_products(sum, ones, pair.even);
      add_products(sum, ones, pair.odd);
      if (chunks) store_quarters(sum, fields, to + c / kLanes + f);
    }
    if (sums && !chunks) store_quarters(sum, 1, to + c / quarter);
  }
  if (!sums) return;
  const std::int64_t quarters = chunks ? 1 : sum_slot_columns(w) / quarter;
  for (std::int64_t k = 0; quarters > 1 && k < packed.slots; ++k) {
    float sum = 0.0F;
    const std::int64_t end = min64((k + 1) * quarters, packed.columns / quarter);
    for (std::int64_t q = k * quarters; q < end; ++q) sum += to[q];
    to[k] = sum;
  }
  _mm512_storeu_ps(to + packed.slots, _mm512_setzero_ps());
}

void matmul_sums_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                            std::int64_t row_end) noexcept {
  with_sum_unit(w, [&]<class Unit>() {
    if constexpr (Unit::kFields > 1) {
      if (has_chunk_groups(w)) return SumProduct<Unit, true>(w, job, row_end).run(row, row_end);
    }
    SumProduct<Unit, false>(w, job, row_end).run(row, row_end);
  });
}

}  // namespace quantal

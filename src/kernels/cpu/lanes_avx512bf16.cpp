// Products of five and more rows of bfloat16 activations with codes whose scales can wait for
// sums, as in sums_avx512bf16.cpp, but a lane is a weight row: codes are transposed while they are
// packed, looked up in one fixed table and multiplied with pairs of columns of the activations,
//
//   y[m, n] = sum over pieces of scale * sum_k level(code(n, k)) x[m, k] + offset * sum_k x[m, k]
//
// A piece is what of a group lies in a unit. Its sums begin at zero, two products at a time in the
// order of units; pieces are added in order by fma, scale first; the bias comes last.
#include "kernels/cpu/int_avx512_inl.h"
#include "kernels/cpu/lane_inputs_avx512_inl.h"

namespace quantal {
namespace {

constexpr std::int64_t kMinTile = kMaxSumInputs + 1, kMinFiller = kMinTile + 1;  // rows of tiles
constexpr std::int64_t kMaxTiles = kMaxBf16Inputs / 8;
constexpr std::int64_t kSlots = kStretchSlots + 2 * kLanes;

/// A piece of kLaneRows rows: pairs of columns, scales and offsets (null: none).
struct LanePiece {
  std::int64_t pairs;
  const float* a;
  const float* b;
};

/// Sums of a register tile. Every loop over them must be unrolled.
template <int kInputs>
struct LaneSums {
  __m512 of[kInputs][kLaneVecs];

  [[gnu::always_inline]] LaneSums() {
#pragma GCC unroll 24
    for (int i = 0; i < kInputs * kLaneVecs; ++i)
      of[i / kLaneVecs][i % kLaneVecs] = _mm512_setzero_ps();
  }
  /// += a pair of columns of the weights with that of each input.
  [[gnu::always_inline]] void add(const __m512i (&values)[kLaneVecs], const std::uint32_t* x) {
#pragma GCC unroll 12
    for (int m = 0; m < kInputs; ++m) {
      const __m512i input = _mm512_set1_epi32(static_cast<int>(x[m]));
#pragma GCC unroll 2
      for (int v = 0; v < kLaneVecs; ++v) add_products(of[m][v], values[v], input);
    }
  }
  /// totals += scale * sums + offset * sums of x.
  [[gnu::always_inline]] void add_to(const LanePiece& piece, const float* sums_of_x,
                                     LaneSums& totals) const {
    piece.b == nullptr ? add_scaled<false>(piece, sums_of_x, totals)
                       : add_scaled<true>(piece, sums_of_x, totals);
  }
  [[gnu::always_inline]] void load(const float* totals) {
#pragma GCC unroll 24
    for (int i = 0; i < kInputs * kLaneVecs; ++i) {
      of[i / kLaneVecs][i % kLaneVecs] = _mm512_load_ps(totals + i * kLanes);
    }
  }
  [[gnu::always_inline]] void store(float* totals) const {
#pragma GCC unroll 24
    for (int i = 0; i < kInputs * kLaneVecs; ++i) {
      _mm512_store_ps(totals + i * kLanes, of[i / kLaneVecs][i % kLaneVecs]);
    }
  }

 private:
  template <bool kOffsets>
  [[gnu::always_inline]] void add_scaled(const LanePiece& piece, const float* sums_of_x,
                                         LaneSums& totals) const {
#pragma GCC unroll 2
    for (int v = 0; v < kLaneVecs; ++v) {
      const __m512 a = _mm512_loadu_ps(piece.a + v * kLanes);
      const __m512 b = kOffsets ? _mm512_loadu_ps(piece.b + v * kLanes) : a;
#pragma GCC unroll 12
      for (int m = 0; m < kInputs; ++m) {
        __m512& total = totals.of[m][v];
        total = _mm512_fmadd_ps(a, of[m][v], total);
        if (kOffsets) total = _mm512_fmadd_ps(b, _mm512_set1_ps(sums_of_x[m]), total);
      }
    }
  }
};

/// totals += the pieces, whose values are in `panel`, for a tile of activations.
template <int kInputs>
void multiply_panel(const LanePiece* pieces, std::int64_t count, const std::uint32_t* panel,
                    const std::uint32_t* x, const float* sums_of_x, float* out) {
  LaneSums<kInputs> totals;
  totals.load(out);
  for (const LanePiece* piece = pieces; piece < pieces + count; ++piece, sums_of_x += kInputs) {
    LaneSums<kInputs> sums;
    for (std::int64_t k = 0; k < piece->pairs; ++k, panel += kLaneRows, x += kInputs) {
      const __m512i values[kLaneVecs] = {load_512(panel), load_512(panel + kLanes)};
      sums.add(values, x);
    }
    sums.add_to(*piece, sums_of_x, totals);
  }
  totals.store(out);
}

/// Weight rows in blocks of kLaneRows.
template <class Unit, bool kChunks>
class LaneProduct {
 public:
  LaneProduct(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_end)
      : w_(w),
        job_(job),
        row_end_(row_end),
        unit_(w),
        slots_(w, w.offset == OffsetKind::kOver127 ? kOneOver127 : 1.0F),
        pieces_(w),
        tiles_(lane_tiles(job.inputs)),
        sum_columns_(lane_columns(w)),
        totals_(job.scratch),
        a_(totals_ + job.inputs * kLaneRows),
        b_(a_ + kSlots * kLaneRows),
        codes_(w, row_end) {
    for (std::int64_t t = 0; t <= tiles_; ++t) first_[t] = job.inputs * t / tiles_;
    static_assert(kMaxBf16Inputs * kLaneRows + 2 * kSlots * kLaneRows <= kBf16ScratchFloats);
  }

  void run(std::int64_t row) {
    ask_for_stats(w_, row, kLaneRows);
    stats_ahead_ = stats_of(row + kLaneRows);
    codes_.begin(row);
    for (; row < row_end_; row += kLaneRows) {
      block(row, min64(kLaneRows, row_end_ - row));
      codes_.ask_from(row + 2 * kLaneRows);
    }
  }

 private:
  using First = void (LaneProduct::*)(const std::uint32_t* x, const float* sums_of_x,
                                      float* totals);
  using Others = decltype(&multiply_panel<kMinFiller>);

  /// kFill: more tiles follow, which have 6 inputs or more.
  static First first_of(std::int64_t inputs) {
    constexpr First kOf[] = {&LaneProduct::multiply<false, 5>,  &LaneProduct::multiply<false, 6>,
                             &LaneProduct::multiply<false, 7>,  &LaneProduct::multiply<false, 8>,
                             &LaneProduct::multiply<false, 9>,  &LaneProduct::multiply<false, 10>,
                             &LaneProduct::multiply<false, 11>, &LaneProduct::multiply<false, 12>};
    return kOf[inputs - kMinTile];
  }
  static First filler_of(std::int64_t inputs) {
    constexpr First kOf[] = {&LaneProduct::multiply<true, 6>,  &LaneProduct::multiply<true, 7>,
                             &LaneProduct::multiply<true, 8>,  &LaneProduct::multiply<true, 9>,
                             &LaneProduct::multiply<true, 10>, &LaneProduct::multiply<true, 11>,
                             &LaneProduct::multiply<true, 12>};
    return kOf[inputs - kMinFiller];
  }
  static Others others_of(std::int64_t inputs) {
    constexpr Others kOf[] = {multiply_panel<6>, multiply_panel<7>,  multiply_panel<8>,
                              multiply_panel<9>, multiply_panel<10>, multiply_panel<11>,
                              multiply_panel<12>};
    return kOf[inputs - kMinFiller];
  }

  void block(std::int64_t row, std::int64_t rows) {
    for (std::int64_t i = 0; i < job_.inputs * kLaneRows; i += kLanes) {
      _mm512_store_ps(totals_ + i, _mm512_setzero_ps());
    }
    pieces_ = Pieces(w_);
    std::int64_t piece = 0;
    for (std::int64_t c = 0; c < w_.cols; c += kStretch) {
      const std::int64_t n = min64(kStretch, w_.cols - c);
      const std::int64_t position = slots_.template fill<kLaneRows>(row, rows, c, n, a_, b_);
      slot_ = position / w_.group_size * kLaneRows;
      for (std::int64_t k = 0; k < n; k += Unit::kColumns) {
        codes_.transpose();
        ask_for_later_stats(row + kLaneRows, c + k);
        const std::int64_t next = c + k + Unit::kColumns;
        next < w_.cols ? codes_.aim(row, next) : codes_.aim(row + kLaneRows, 0);
        find_pieces(c + k);
        multiply_tiles(c + k, piece);
        piece += count_;
        codes_.copy_rest();
      }
    }
    for (std::int64_t m = 0; m < job_.inputs; ++m) {
      for (std::int64_t r = 0; r < rows; r += kLanes) {
        store_outputs(job_, totals_ + m * kLaneRows + r, m, row + r, min64(kLanes, rows - r));
      }
    }
  }

  /// Statistics of the rows from `row` on, which come next: as much as the columns up to the end of
  /// the unit at `col` are of a row.
  void ask_for_later_stats(std::int64_t row, std::int64_t col) {
    const std::int64_t bytes = kLaneRows * w_.stat_bytes;
    const char* const part =
        stats_of(row) +
        static_cast<std::int64_t>(static_cast<float>(bytes) *
                                  static_cast<float>(col + Unit::kColumns) * per_column_);
    const char* const end = part < stats_of(row_end_) ? part : stats_of(row_end_);
    for (; stats_ahead_ < end; stats_ahead_ += 64) _mm_prefetch(stats_ahead_, _MM_HINT_T1);
  }
  const char* stats_of(std::int64_t row) const {
    return reinterpret_cast<const char*>(w_.stats + row * w_.stat_bytes);
  }

  /// Pieces of the unit at column `col`.
  void find_pieces(std::int64_t col) {
    constexpr std::int64_t kColumns = kChunks ? kLanes : quarter_columns(Unit::kBits);
    const std::int64_t end = min64(Unit::kColumns, w_.cols - col) / kColumns;
    count_ = 0;
    for (std::int64_t i = 0; i < end;) {
      const std::int64_t size = pieces_.next(end - i);
      found_[count_] = {size * kColumns / 2, a_ + slot_, w_.has_offsets ? b_ + slot_ : nullptr};
      ++count_;
      i += size;
      if (pieces_.at_group()) slot_ += kLaneRows;
    }
  }

  void multiply_tiles(std::int64_t col, std::int64_t piece) {
    for (std::int64_t t = 0; t < tiles_; ++t) {
      const std::int64_t m = first_[t], inputs = first_[t + 1] - m;
      const auto* x = reinterpret_cast<const std::uint32_t*>(job_.x + m * job_.ldx);
      const auto* sums_of_x = reinterpret_cast<const float*>(x + sum_columns_ / 2 * inputs);
      x += col / 2 * inputs;
      sums_of_x += piece * inputs;
      float* const totals = totals_ + m * kLaneRows;
      if (t == 0) {
        const First first = tiles_ == 1 ? first_of(inputs) : filler_of(inputs);
        (this->*first)(x, sums_of_x, totals);
      } else {
        others_of(inputs)(found_, count_, panel_, x, sums_of_x, totals);
      }
    }
  }

  /// multiply_panel of the first tile: fills the panel and copies codes of the next unit.
  template <bool kFill, int kInputs>
  void multiply(const std::uint32_t* x, const float* sums_of_x, float* out) {
    const Unit unit = unit_;
    LaneSums<kInputs> totals;
    totals.load(out);
    std::uint32_t* panel = panel_;
    int d = 0;
    for (const LanePiece *piece = found_, *end = found_ + count_; piece < end;) {
      if constexpr (kChunks) {
        chunks<kFill, 0, kInputs>(unit, d, piece, end, x, sums_of_x, totals, panel);
        piece += Unit::kFields;
        d += kQuarterWords;
      } else {
        LaneSums<kInputs> sums;
        for (std::int64_t k = 0; k < piece->pairs; k += Unit::kPairs, ++d) {
          codes_.copy();
          pairs<kFill, 0, 1>(unit, d, x, panel, sums);
        }
        sums.add_to(*piece, sums_of_x, totals);
        sums_of_x += kInputs;
        ++piece;
      }
    }
    totals.store(out);
  }
  /// Chunks of a quarter from kChunk on, each a piece of its own.
  template <bool kFill, int kChunk, int kInputs>
  [[gnu::always_inline]] void chunks(const Unit& unit, int d, const LanePiece* piece,
                                     const LanePiece* end, const std::uint32_t*& x,
                                     const float*& sums_of_x, LaneSums<kInputs>& totals,
                                     std::uint32_t*& panel) {
    if constexpr (kChunk < Unit::kFields) {
      if (piece == end) return;
      LaneSums<kInputs> sums;
      for (int i = 0; i < kQuarterWords; ++i) {
        if (kChunk == 0) codes_.copy();
        pairs<kFill, kChunk, Unit::kFields>(unit, d + i, x, panel, sums);
      }
      sums.add_to(*piece, sums_of_x, totals);
      sums_of_x += kInputs;
      chunks<kFill, kChunk + 1, kInputs>(unit, d, piece + 1, end, x, sums_of_x, totals, panel);
    }
  }

  /// Pairs kFirst, kFirst + kStep, .. of word d.
  template <bool kFill, int kFirst, int kStep, int kInputs>
  [[gnu::always_inline]] void pairs(const Unit& unit, int d, const std::uint32_t*& x,
                                    std::uint32_t*& panel, LaneSums<kInputs>& sums) const {
    __m512i low[kLaneVecs], high[kLaneVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kLaneVecs; ++v) {
      low[v] = codes_.low(d, v);
      high[v] = codes_.high(d, v);
    }
    each_pair<kFill, kFirst, kStep>(unit, low, high, x, panel, sums);
  }
  template <bool kFill, int kPair, int kStep, int kInputs>
  [[gnu::always_inline]] static void each_pair(const Unit& unit, const __m512i (&low)[kLaneVecs],
                                               const __m512i (&high)[kLaneVecs],
                                               const std::uint32_t*& x, std::uint32_t*& panel,
                                               LaneSums<kInputs>& sums) {
    if constexpr (kPair < Unit::kPairs) {
      __m512i values[kLaneVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kLaneVecs; ++v) {
        values[v] = unit.template values<kPair>(low[v], high[v]);
        if (kFill) _mm512_store_si512(panel + v * kLanes, values[v]);
      }
      sums.add(values, x);
      x += kInputs;
      panel += kLaneRows;
      each_pair<kFill, kPair + kStep, kStep>(unit, low, high, x, panel, sums);
    }
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const std::int64_t row_end_;
  const Unit unit_;
  const IntSlots<VecAvx512, IntAvx512> slots_;
  Pieces pieces_;
  const std::int64_t tiles_;
  const std::int64_t sum_columns_;  // sums of x come after so many columns
  const float per_column_ = 1.0F / static_cast<float>(w_.cols);
  const char* stats_ahead_ = nullptr;
  float* const totals_;
  float* const a_;
  float* const b_;
  std::int64_t slot_ = 0;              // of the next piece
  std::int64_t count_ = 0;             // of pieces found
  std::int64_t first_[kMaxTiles + 1];  // row of activations of each tile
  LanePiece found_[kUnitWords];
  alignas(64) std::uint32_t panel_[Unit::kColumns / 2 * kLaneRows];
  LaneCodes<Unit> codes_;
};

template <class Fn>
void with_lane_unit(const KernelMatrix& w, Fn fn) {
  with_sum_unit(w, [&]<class Sum>() { fn.template operator()<LaneUnit<Sum::kBits>>(); });
}

}  // namespace

bool has_lanes_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept {
  return inputs > kMaxSumInputs && inputs <= kMaxLaneInputs && has_sum_units(w);
}
Bf16Tiles lane_tiles_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept {
  return {lane_width(w), lane_tiles(inputs)};
}
void pack_lanes_avx512bf16(const KernelMatrix& w, const std::uint16_t* in, std::int64_t rows,
                           std::uint16_t* out) noexcept {
  with_lane_unit(w, [&]<class Unit>() { LanePacker<Unit>(w, in, rows, out).run(); });
}
void matmul_lanes_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                             std::int64_t row_end) noexcept {
  if (row == row_end) return;
  with_lane_unit(w, [&]<class Unit>() {
    if constexpr (Unit::kFields > 1) {
      if (has_chunk_groups(w)) return LaneProduct<Unit, true>(w, job, row_end).run(row);
    }
    LaneProduct<Unit, false>(w, job, row_end).run(row);
  });
}

}  // namespace quantal

// Activations for products in which a lane is a weight row (lanes_avx512bf16.cpp). AVX-512 with
// BF16 only.
#pragma once

#include "kernels/cpu/lane_units_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Tiles of nearly equal size in which activations stand.
inline std::int64_t lane_tiles(std::int64_t inputs) {
  constexpr std::int64_t kMost = 12, kBest = 8;
  const std::int64_t size = inputs <= 2 * kMost ? kMost : kBest;
  return (inputs + size - 1) / size;
}

/// Pieces of a row in turn: what of a group lies in a unit, a chunk where groups end within
/// quarters. No divisions: there are many.
class Pieces {
 public:
  explicit Pieces(const KernelMatrix& w)
      : most_(has_chunk_groups(w) ? 1 : w.group_size / quarter_columns(w.bits)),
        columns_(has_chunk_groups(w) ? kLanes : quarter_columns(w.bits)),
        of_group_(w.group_size / columns_),
        left_(of_group_) {}

  /// Columns in which pieces are counted.
  std::int64_t columns() const { return columns_; }
  /// Size of the next piece, of which `left` are left in the unit.
  [[gnu::always_inline]] std::int64_t next(std::int64_t left) {
    const std::int64_t size = min64(min64(most_, left_), left);
    left_ -= size;
    if (left_ == 0) left_ = of_group_;
    return size;
  }
  /// True if a group begins with the next piece.
  bool at_group() const { return left_ == of_group_; }

 private:
  std::int64_t most_, columns_, of_group_;
  std::int64_t left_;  // of the group
};

/// Columns of a packed row: whole units. Sums of pieces follow those of a tile.
inline std::int64_t lane_columns(const KernelMatrix& w) {
  return (w.cols + unit_columns(w.bits) - 1) / unit_columns(w.bits) * unit_columns(w.bits);
}
/// Elements of a packed row.
inline std::int64_t lane_width(const KernelMatrix& w) {
  return lane_columns(w) + 2 * (w.cols / Pieces(w).columns());
}

/// Packs a tile, `inputs` <= 12 rows: pairs of columns in the order in which they are multiplied,
/// each of all its rows, then sums of the columns of each piece.
template <class Unit>
class LanePacker {
 public:
  LanePacker(const KernelMatrix& w, const std::uint16_t* in, std::int64_t inputs,
             std::uint16_t* out)
      : w_(w),
        pieces_(w),
        chunks_(has_chunk_groups(w)),
        in_(in),
        inputs_(inputs),
        mask_(VecAvx512::first(static_cast<int>(inputs))),
        out_(reinterpret_cast<std::uint32_t*>(out)),
        sums_(reinterpret_cast<float*>(out_ + lane_columns(w) / 2 * inputs)) {}

  void run() {
    for (std::int64_t c = 0; c < w_.cols; c += Unit::kColumns) {
      for (int f = 0; f < Unit::kFields; ++f) chunk(c, f);
      if (has_sums_of_inputs(w_)) add_sums(min64(Unit::kColumns, w_.cols - c));
    }
  }

 private:
  /// Chunks f of the quarters of a unit.
  void chunk(std::int64_t c, int f) {
    const __m512i ones = _mm512_set1_epi16(0x3F80);
    const std::int64_t at = c + f * kLanes;
    __m512i even[16], odd[16];
    for (std::int64_t m = 0; m < 16; ++m) {
      if (m >= inputs_) {
        even[m] = odd[m] = _mm512_setzero_si512();
        continue;
      }
      const ChunkPair pair(in_ + m * w_.cols + at, quarter_columns(Unit::kBits), w_.cols - at);
      even[m] = pair.even;
      odd[m] = pair.odd;
      __m512 sum = _mm512_setzero_ps();
      add_products(sum, ones, pair.even);
      add_products(sum, ones, pair.odd);
      store_quarters(sum, Unit::kFields * 16, of_chunks_ + f * 16 + m);
    }
    std::uint32_t* const unit = out_ + c / 2 * inputs_;
    transpose_16(even, [&](int d, __m512i pairs) { store(unit, d, f, 0, pairs); });
    transpose_16(odd, [&](int d, __m512i pairs) { store(unit, d, f, 1, pairs); });
  }
  void store(std::uint32_t* unit, int d, int f, int odd, __m512i pairs) const {
    const int quarter = d / kQuarterWords;
    const int word = chunks_ ? quarter * kQuarterWords * Unit::kPairs + f * 2 * kQuarterWords +
                                   d % kQuarterWords * 2 + odd
                             : d * Unit::kPairs + odd * Unit::kFields + f;
    _mm512_mask_storeu_epi32(unit + word * inputs_, mask_, pairs);
  }

  /// Sums of the pieces of a unit, `columns` of which are in the row.
  void add_sums(std::int64_t columns) {
    const std::int64_t end = columns / pieces_.columns();
    const std::int64_t chunks = pieces_.columns() / kLanes;
    const float* of = of_chunks_;
    for (std::int64_t i = 0; i < end; sums_ += inputs_) {
      const std::int64_t size = pieces_.next(end - i);
      __m512 sum = _mm512_setzero_ps();
      for (std::int64_t k = 0; k < size * chunks; ++k, of += kLanes) {
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(of));
      }
      _mm512_mask_storeu_ps(sums_, mask_, sum);
      i += size;
    }
  }

  const KernelMatrix& w_;
  Pieces pieces_;
  const bool chunks_;
  const std::uint16_t* const in_;
  const std::int64_t inputs_;
  const __mmask16 mask_;
  std::uint32_t* const out_;
  float* sums_;
  float of_chunks_[4 * Unit::kFields * 16] = {};  // of a unit, by inputs
};

}  // namespace
}  // namespace quantal

// Codes of packed rows as bytes for integer products (int_kernels.h): a lane is a weight row.
//
// Codes are transposed while they are still packed, 16 columns of all fields at a time, and then
// unpacked: a vector holds four columns of each of its rows.
//
// V is what the integers need (int_*_inl.h):
//   kLanes            weight rows of a vector          kInputs   of a register tile
//   kHoldSums         registers hold sums and dots of a tile
//   kDirectInputs     up to which codes are multiplied without a panel: 0 or 2
//   kSigned           wide codes are stored as u - 128
//   kCopyUnits        units are copied before they are transposed
//   kHalves           low_half(f16, words) and high_half: 16-bit floats of 32-bit words
//   I, F              32-bit integers and floats of kLanes rows; of I also 4 * kLanes bytes
//   transpose(rows, offset, n, out)   out[i], i < kLanes, lane r: 32-bit word i at rows[r] +
//   offset;
//                                     unspecified or 0 from word n on, which is not read
//   dot<kWide>(sum, u, x)             sum += the four products of the bytes of each lane
#pragma once

#include "kernels/cpu/int_kernels.h"
#include "kernels/cpu/stats_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// What is unpacked at a time: 64 bytes of one plane, or a unit of two (Codes in codes_inl.h).
template <class V, int kBits>
struct IntUnit : Planes<kBits> {
  using I = typename V::I;
  using Planes<kBits>::kLow, Planes<kBits>::kHigh, Planes<kBits>::kFields;
  static constexpr int kChunks = kHigh != 0 ? 8 / kHigh : 4 * kFields;  // of 16 columns
  static constexpr int kColumns = 16 * kChunks;
  static constexpr int kWords = kColumns * kBits / 32;
  static constexpr int kLowWords = kColumns * kLow / 32;
  static constexpr int kBytes = 4 * kWords;
  static constexpr int kVectors = (kWords + V::kLanes - 1) / V::kLanes * V::kLanes;

  /// Bits [kFrom, kFrom + kCount) of every byte, moved to kTo; all other bits are 0.
  template <int kFrom, int kCount, int kTo>
  static I field(I words) {
    constexpr auto kMask = ((1U << kCount) - 1U) << kTo;
    const I moved = V::template shift<kFrom - kTo>(words);
    if constexpr (kCount == 8) return moved;
    return V::and_i(moved, V::set1_i(static_cast<std::int32_t>(kMask * 0x01010101U)));
  }
  /// Columns 16 kChunk + 4 j .. + 3.
  template <int kChunk>
  static I codes(const I* words, int j) {
    const I low = field<kLow*(kChunk % kFields), kLow, 0>(words[kChunk / kFields * 4 + j]);
    if constexpr (kHigh == 0) return low;
    if constexpr (kHigh != 0) {
      return V::or_i(low, field<kHigh * kChunk, kHigh, kLow>(words[kLowWords + j]));
    }
  }
};

/// 16 levels for a table, or nothing.
template <class V, int kBits, bool kTable>
class IntUnpacker {
 public:
  using I = typename V::I;
  using Unit = IntUnit<V, kBits>;
  static constexpr std::int64_t kStep = 2 * V::kLanes;  // words of a panel per 4 columns

  explicit IntUnpacker(const IntForm& form) : levels_(V::load_levels(form.levels)) {}

  /// Columns 16 kChunk + 4 j .. + 3 of a unit as they are multiplied.
  template <int kChunk>
  [[gnu::always_inline]] I codes(const I* in, int j) const {
    I u = Unit::template codes<kChunk>(in, j);
    if constexpr (kTable) u = V::lookup(levels_, u);
    if constexpr (V::kSigned && (kTable || kBits == 8)) {
      u = V::xor_i(u, V::set1_i(static_cast<std::int32_t>(0x80808080U)));
    }
    return u;
  }
  template <int kChunk>
  [[gnu::always_inline]] void store(const I* in, std::int32_t* panel) const {
    if constexpr (kChunk < Unit::kChunks) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        V::store_i(panel + (4 * kChunk + j) * kStep, codes<kChunk>(in, j));
      }
      store<kChunk + 1>(in, panel);
    }
  }

 private:
  const decltype(V::load_levels(nullptr)) levels_;
};

/// Rows of codes that stand together.
struct IntRows {
  const std::uint8_t* codes[kIntRowUnit];
  std::int64_t code_bytes;
  const std::uint8_t* ahead;  // codes that will be read after these rows, and where they end
  const std::uint8_t* end;

  /// While some codes are used, asks for as many lines of the rows that come later, which are one
  /// run of memory. In its order, every line: an order by rows, every other line, and lines of the
  /// next unit beside these were all slower.
  template <int kLines>
  [[gnu::always_inline]] void ask() {
    if (ahead >= end) return;
#pragma GCC unroll 20
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + 64 * i);
    ahead += 64 * kLines;
  }
};

/// Units of V::kLanes rows in turn, transposed. Rows are powers of two apart, so lines that were
/// asked for do not stay in the first-level cache: with kCopy the next unit is copied while one is
/// used.
template <class V, class Unit, bool kCopy>
class IntUnits {
 public:
  using I = typename V::I;

  /// `count` units from `offset` on of the rows from `row` on.
  IntUnits(IntRows& rows, std::int64_t row, std::int64_t offset, std::int64_t count)
      : rows_(rows), codes_(rows.codes + row), offset_(offset), left_(count) {
    if constexpr (kCopy) {
      for (int r = 0; r < V::kLanes; ++r) copies_[r] = raw_ + r * kCopyBytes;
      copy();
    }
  }
  [[gnu::always_inline]] void next(I (&in)[Unit::kVectors]) {
    const std::int64_t words = (rows_.code_bytes - offset_) / 4;
    const std::uint8_t* const* from = kCopy ? copies_ : codes_;
#pragma GCC unroll 16
    for (int t = 0; t < Unit::kWords; t += V::kLanes) {
      const std::int64_t n = min64(min64(V::kLanes, Unit::kWords - t), words - t);
      V::transpose(from, (kCopy ? 0 : offset_) + 4 * t, n, in + t);
    }
    offset_ += Unit::kBytes;
    if constexpr (kCopy) {
      if (--left_ != 0) copy();
    }
  }

 private:
  static constexpr int kCopyBytes = (Unit::kBytes + 63) / 64 * 64;

  [[gnu::always_inline]] void copy() {
    const std::int64_t bytes = rows_.code_bytes - offset_;
    if (bytes >= Unit::kBytes) {
#pragma GCC unroll 16
      for (int r = 0; r < V::kLanes; ++r) {
        __builtin_memcpy(raw_ + r * kCopyBytes, codes_[r] + offset_, Unit::kBytes);
      }
      return;
    }
    for (int r = 0; r < V::kLanes; ++r) {
      __builtin_memcpy(raw_ + r * kCopyBytes, codes_[r] + offset_, static_cast<std::size_t>(bytes));
    }
  }

  IntRows& rows_;
  const std::uint8_t* const* const codes_;
  std::int64_t offset_, left_;
  const std::uint8_t* copies_[V::kLanes];
  alignas(64) std::uint8_t raw_[kCopy ? V::kLanes * kCopyBytes : 1];
};

/// Fills a panel with columns [col, col + n) of 2 * V::kLanes rows, col a multiple of
/// kIntPanelColumns, up to the end of the last unit.
using FillPanel = void (*)(const IntForm& form, IntRows& rows, std::int64_t col, std::int64_t n,
                           std::int32_t* panel);

template <class V, int kBits, bool kTable>
void fill_panel(const IntForm& form, IntRows& rows, std::int64_t col, std::int64_t n,
                std::int32_t* panel) {
  using Unit = IntUnit<V, kBits>;
  const IntUnpacker<V, kBits, kTable> unpacker(form);
  constexpr int kLines = (Unit::kBytes * V::kLanes / 64 + 1) / 2;  // the others while it is used
  for (int half = 0; half < 2; ++half, panel += V::kLanes) {
    IntUnits<V, Unit, V::kCopyUnits> units(rows, half * V::kLanes,
                                           col / Unit::kColumns * Unit::kBytes,
                                           (n + Unit::kColumns - 1) / Unit::kColumns);
    for (std::int64_t k = 0; k < n; k += Unit::kColumns) {
      typename V::I in[Unit::kVectors];
      rows.template ask<kLines>();
      units.next(in);
      unpacker.template store<0>(in, panel + k / 4 * (2 * V::kLanes));
    }
  }
}

template <class V>
FillPanel panel_filler(const KernelMatrix& w, const IntForm& form) {
  switch (w.bits) {
    case 1:
      return fill_panel<V, 1, false>;
    case 2:
      return fill_panel<V, 2, false>;
    case 3:
      return fill_panel<V, 3, false>;
    case 4:
      return form.table ? fill_panel<V, 4, true> : fill_panel<V, 4, false>;
    case 5:
      return fill_panel<V, 5, false>;
    case 6:
      return fill_panel<V, 6, false>;
    default:
      return fill_panel<V, 8, false>;
  }
}

/// A panel and the statistics of its runs, 2 * kLanes of each.
struct IntPanel {
  const std::int32_t* codes;
  std::int64_t col;         // first column
  std::int64_t first_run;   // its run
  std::int64_t runs;        // of the panel
  std::int64_t words;       // of 4 columns in a run
  std::int64_t last_words;  // in the last run
  std::int64_t ask_lines;   // of codes that come later, in a run
  const float* a[kIntPanelColumns / kLanes];
  const float* b[kIntPanelColumns / kLanes];
};

}  // namespace
}  // namespace quantal

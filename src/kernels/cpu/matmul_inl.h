// Products straight from packed codes (quantal/kernels.h, matmul).
//
// Defined order of a sum, the same on every instruction set and for every number of inputs: lane i
// of 16 accumulates columns i, i + 16, ... with fma, from zero in each kSumColumns columns; these
// partial vectors are added in order; T::sum adds the lanes; the bias comes last.
#pragma once

#include "kernels/cpu/codes_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Columns decoded to scratch before they are used: kTileRows * kDecodeColumns floats stay in L1.
constexpr std::int64_t kDecodeColumns = 512;
static_assert(kSumColumns == kStretch && kSumColumns % kDecodeColumns == 0);

/// Writes y[m, row .. row + kRows) of input m.
template <class T, int kRows>
void finish_outputs(const MatmulJob& job, const typename T::F* totals, int m, std::int64_t row) {
  float sums[kLanes] = {};
  for (int r = 0; r < kRows; ++r) {
    sums[r] = T::sum(totals[r]);
    if (job.bias != nullptr) sums[r] = sums[r] + job.bias[row + r];
  }
  auto* y = static_cast<std::uint8_t*>(job.y);
  const std::int64_t bytes = job.y_kind == FloatKind::kF32 ? 4 : 2;
  store_kind_n<T>(job.y_kind, T::load(sums), y + (m * job.ldy + row) * bytes, kRows);
}

/// acc[r][m] += w[r] x[m] over `count` (multiple of 16) columns of decoded rows.
template <class T, int kRows, int kInputs>
void accumulate_tile(const float* decoded, const float* x, std::int64_t ldx, std::int64_t count,
                     typename T::F* acc) {
  using F = typename T::F;
  F sums[kInputs][kRows];
  for (int m = 0; m < kInputs; ++m) {
    for (int r = 0; r < kRows; ++r) sums[m][r] = acc[m * kRows + r];
  }
  for (std::int64_t c = 0; c < count; c += kLanes) {
    F values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = T::load(decoded + r * kDecodeColumns + c);
    for (int m = 0; m < kInputs; ++m) {
      const F input = T::load(x + m * ldx + c);
      for (int r = 0; r < kRows; ++r) sums[m][r] = T::fma(values[r], input, sums[m][r]);
    }
  }
  for (int m = 0; m < kInputs; ++m) {
    for (int r = 0; r < kRows; ++r) acc[m * kRows + r] = sums[m][r];
  }
}

/// Short rows defeat the hardware's prefetcher: asks for the codes of columns [col, col + count).
inline void prefetch_row(const KernelMatrix& w, std::int64_t row, std::int64_t col,
                         std::int64_t count) {
  const std::uint8_t* codes = w.codes + row * w.code_bytes + col * w.bits / 8;
  for (std::int64_t byte = 0; byte < count * w.bits / 8; byte += 64) {
    __builtin_prefetch(codes + byte);
  }
}

/// Any matrix, any number of inputs: decode some columns of kRows rows, use them for all inputs.
template <class T, int kRows>
void product_rows(const KernelMatrix& w, DecodeRow decode, const MatmulJob& job, std::int64_t row) {
  using F = typename T::F;
  alignas(64) float decoded[kRows * kDecodeColumns];
  F totals[kMaxInputRows * kRows];
  F acc[kMaxInputRows * kRows];
  const int lanes = job.inputs * kRows;
  for (int i = 0; i < lanes; ++i) totals[i] = T::zero();
  for (std::int64_t block = 0; block < w.cols; block += kSumColumns) {
    const std::int64_t block_end = min64(block + kSumColumns, w.cols);
    for (int i = 0; i < lanes; ++i) acc[i] = T::zero();
    for (std::int64_t c = block; c < block_end; c += kDecodeColumns) {
      const std::int64_t n = min64(kDecodeColumns, block_end - c);
      const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
      for (int r = 0; r < kRows; ++r) {
        if (row + r + kRows < w.rows) prefetch_row(w, row + r + kRows, c, n);
        decode(w, row + r, c, n, decoded + r * kDecodeColumns);
      }
      int m = 0;
      for (; m + T::kTileInputs <= job.inputs; m += T::kTileInputs) {
        accumulate_tile<T, kRows, T::kTileInputs>(decoded, job.x + m * job.ldx + c, job.ldx, padded,
                                                  acc + m * kRows);
      }
      for (; m < job.inputs; ++m) {
        accumulate_tile<T, kRows, 1>(decoded, job.x + m * job.ldx + c, job.ldx, padded,
                                     acc + m * kRows);
      }
    }
    for (int i = 0; i < lanes; ++i) totals[i] = T::add(totals[i], acc[i]);
  }
  for (int m = 0; m < job.inputs; ++m) finish_outputs<T, kRows>(job, totals + m * kRows, m, row);
}

// ------------------------------------------------------------------ no scratch: few inputs

/// Codes of at most 4 bits: the table of a group's values is built where the group begins.
template <class T, int kCodeBits, class ValueRule>
struct TableCoder {
  using C = Codes<T, kCodeBits>;
  using Group = typename T::F;
  Group codes;

  explicit TableCoder(const KernelMatrix& w) : codes(T::load(w.table)) {}
  Group group(const Stretch& stats, std::int64_t slot) const {
    return ValueRule::template value<T>(codes, T::set1(stats.scale[slot]),
                                        T::set1(stats.offset[slot]));
  }
  static typename T::F value(typename T::U code, const Group& table) {
    return lookup<T, kCodeBits>(table, code);
  }
};

/// Wider codes, computed one vector at a time.
template <class T, class R, class ValueRule>
struct NumberCoder {
  using C = R;
  struct Group {
    typename T::F scale, offset;
  };
  R reader;

  explicit NumberCoder(const KernelMatrix& w) : reader(w) {}
  static Group group(const Stretch& stats, std::int64_t slot) {
    return {T::set1(stats.scale[slot]), T::set1(stats.offset[slot])};
  }
  typename T::F value(typename T::U code, const Group& g) const {
    return ValueRule::template value<T>(reader.map(code), g.scale, g.offset);
  }
};

/// Rows of codes against inputs, codes decoded in registers. kUnits: groups consist of whole units.
template <class T, class Coder, bool kUnits, int kRows, int kInputs>
class DirectProduct {
 public:
  DirectProduct(const KernelMatrix& w, const MatmulJob& job, std::int64_t row)
      : w_(w),
        job_(job),
        coder_(w),
        row_(row),
        ld_(w.code_bytes),
        ahead_(row + 2 * kRows <= w.rows ? kRows * w.code_bytes : 0) {}

  void run() {
    Sums totals;
    totals.clear();
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      for (int r = 0; r < kRows; ++r) expand_stretch<T>(w_, row_ + r, c, n, stats_[r]);
      Sums sums;
      sums.clear();
      const std::uint8_t* codes = w_.codes + row_ * ld_;
      if constexpr (kUnits) {
        run_units(codes + c / C::kUnitCodes * C::kUnitBytes, job_.x + c, n, sums);
      } else {
        run_chunks(codes, c, n, sums);
      }
      for (int m = 0; m < kInputs; ++m) {
        for (int r = 0; r < kRows; ++r) totals.v[m][r] = T::add(totals.v[m][r], sums.v[m][r]);
      }
    }
    for (int m = 0; m < kInputs; ++m) finish_outputs<T, kRows>(job_, totals.v[m], m, row_);
  }

 private:
  using F = typename T::F;
  using U = typename T::U;
  using C = typename Coder::C;
  using Group = typename Coder::Group;
  struct Sums {
    F v[kInputs][kRows];
    void clear() {
      for (auto& one : v) {
        for (F& sum : one) sum = T::zero();
      }
    }
  };

  /// sums[m][r] += value of codes of row r * input m, for the 16 columns from x on.
  [[gnu::always_inline]] void add(const U (&chunk)[kRows], const float* x,
                                  const Group (&groups)[kRows], Sums& sums) const {
    F values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = coder_.value(chunk[r], groups[r]);
    for (int m = 0; m < kInputs; ++m) {
      const F input = T::load(x + m * job_.ldx);
      for (int r = 0; r < kRows; ++r) sums.v[m][r] = T::fma(values[r], input, sums.v[m][r]);
    }
  }

  /// Chunks kChunk and on of the unit that begins at `unit`; x is at the unit's first column.
  template <int kChunk>
  [[gnu::always_inline]] void unit_from(const std::uint8_t* unit, const float* x,
                                        const Group (&groups)[kRows], Sums& sums) const {
    if constexpr (kChunk < C::kUnitChunks) {
      U chunk[kRows];
      for (int r = 0; r < kRows; ++r) chunk[r] = C::template chunk<kChunk>(unit + r * ld_);
      add(chunk, x + kChunk * kLanes, groups, sums);
      unit_from<kChunk + 1>(unit, x, groups, sums);
    }
  }

  /// Short rows defeat the hardware's prefetcher: asks for the next rows' line at the same column,
  /// once for each line that a unit begins.
  [[gnu::always_inline]] void prefetch(const std::uint8_t* unit) const {
    if ((reinterpret_cast<std::uintptr_t>(unit) & 63U) >= C::kUnitBytes) return;
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(unit + r * ld_ + ahead_);
  }

  [[gnu::always_inline]] void load_groups(std::int64_t slot, Group (&groups)[kRows]) const {
    for (int r = 0; r < kRows; ++r) groups[r] = coder_.group(stats_[r], slot);
  }

  /// `count` columns from unit and x on, group by group.
  void run_units(const std::uint8_t* unit, const float* x, std::int64_t count, Sums& out) const {
    Sums sums = out;
    const std::int64_t units_of_group = w_.group_size / C::kUnitCodes;
    std::int64_t left = count / C::kUnitCodes;
    std::int64_t units = units_of_group - stats_[0].phase / C::kUnitCodes;
    for (std::int64_t slot = 0; left > 0; ++slot) {
      Group groups[kRows];
      load_groups(slot, groups);
      units = min64(units, left);
      for (std::int64_t u = 0; u < units; ++u) {
        prefetch(unit);
        unit_from<0>(unit, x, groups, sums);
        unit += C::kUnitBytes;
        x += C::kUnitCodes;
      }
      left -= units;
      units = units_of_group;
    }
    out = sums;
  }

  /// The same by chunks, which may begin anywhere in a unit.
  void run_chunks(const std::uint8_t* codes, std::int64_t col, std::int64_t count,
                  Sums& out) const {
    Sums sums = out;
    const std::int64_t stop = col + count;
    std::int64_t border = col + w_.group_size - stats_[0].phase;
    for (std::int64_t slot = 0; col < stop; ++slot, border += w_.group_size) {
      Group groups[kRows];
      load_groups(slot, groups);
      for (const std::int64_t end = min64(border, stop); col < end; col += kLanes) {
        if (col % C::kUnitCodes == 0) prefetch(codes + col / C::kUnitCodes * C::kUnitBytes);
        U chunk[kRows];
        for (int r = 0; r < kRows; ++r) chunk[r] = C::at(codes + r * ld_, col);
        add(chunk, job_.x + col, groups, sums);
      }
    }
    out = sums;
  }

  const KernelMatrix& w_;
  const MatmulJob& job_;
  const Coder coder_;
  const std::int64_t row_, ld_;
  const std::int64_t ahead_;  // bytes from a row to the row that is wanted next
  Stretch stats_[kRows];      // left uninitialized: clearing it would cost as much as using it
};

/// Rows [row, row_end) in steps of kRows as far as they go; returns the first row that is left.
template <class T, class Coder, bool kUnits, int kRows, int kInputs>
std::int64_t direct_rows(const KernelMatrix& w, const MatmulJob& job, std::int64_t row,
                         std::int64_t row_end) {
  for (; row + kRows <= row_end; row += kRows) {
    DirectProduct<T, Coder, kUnits, kRows, kInputs>(w, job, row).run();
  }
  return row;
}

template <class T, class Coder, bool kUnits>
std::int64_t direct_inputs(const KernelMatrix& w, const MatmulJob& job, std::int64_t row,
                           std::int64_t row_end) {
  if (job.inputs == 1) {
    return direct_rows<T, Coder, kUnits, T::kDirectRows, 1>(w, job, row, row_end);
  }
  // More inputs: only where a code takes at most two instructions, else scratch is as fast.
  if constexpr (Coder::C::kUnitChunks <= 2) {
    constexpr int kRows = T::kTileRows;
    if (job.inputs == 2) {
      return direct_rows<T, Coder, kUnits, kRows, 2>(w, job, row, row_end);
    }
    if constexpr (T::kTileInputs >= 4) {
      if (job.inputs == 3) {
        return direct_rows<T, Coder, kUnits, kRows, 3>(w, job, row, row_end);
      }
      if (job.inputs == 4) {
        return direct_rows<T, Coder, kUnits, kRows, 4>(w, job, row, row_end);
      }
    }
  }
  return row;
}

template <class T, class Coder>
std::int64_t direct_groups(const KernelMatrix& w, const MatmulJob& job, std::int64_t row,
                           std::int64_t row_end) {
  if (w.group_size % Coder::C::kUnitCodes == 0) {
    return direct_inputs<T, Coder, true>(w, job, row, row_end);
  }
  if constexpr (Coder::C::kUnitChunks > 1) {
    return direct_inputs<T, Coder, false>(w, job, row, row_end);
  }
  return row;
}

/// As many of the rows as can go without scratch; the bits of a result do not depend on it.
template <class T>
std::int64_t direct_products(const KernelMatrix& w, const MatmulJob& job, std::int64_t row,
                             std::int64_t row_end) {
  const bool whole = w.group_size % kLanes == 0 && w.cols % w.group_size == 0;
  if (w.groups != GroupKind::kRowRuns || !whole) return row;
  with_rule(w, [&]<class V>(V /*rule*/) {
    if (w.bits <= 4) {
      with_table_width(w.bits, [&]<class W>(W /*width*/) {
        if constexpr (V::kOffset != OffsetKind::kOver127) {
          row = direct_groups<T, TableCoder<T, W::kBits, V>>(w, job, row, row_end);
        }
      });
      return;
    }
    with_wide_reader<T>(w, [&]<class R>(R /*reader*/) {
      // 8-bit floats come without offsets, row scales over 127 with 8-bit integers.
      constexpr bool kPlain = R::kKind == CodeKind::kNumber || V::kOffset == OffsetKind::kNone;
      constexpr bool kInteger8 = R::kBits == 8 && R::kKind == CodeKind::kNumber;
      if constexpr (kPlain && (kInteger8 || V::kOffset != OffsetKind::kOver127)) {
        row = direct_groups<T, NumberCoder<T, R, V>>(w, job, row, row_end);
      }
    });
  });
  return row;
}

template <class T>
void matmul_kernel(const KernelMatrix& w, DecodeRow decode, const MatmulJob& job,
                   std::int64_t row_begin, std::int64_t row_end) {
  std::int64_t row = row_begin;
  if constexpr (T::kDirectRows > 0) row = direct_products<T>(w, job, row, row_end);
  for (; row + T::kTileRows <= row_end; row += T::kTileRows) {
    product_rows<T, T::kTileRows>(w, decode, job, row);
  }
  for (; row < row_end; ++row) product_rows<T, 1>(w, decode, job, row);
}

}  // namespace
}  // namespace quantal

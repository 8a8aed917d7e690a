// Products straight from packed codes (quantal/kernels.h, matmul).
//
// Defined order of a sum, the same on every instruction set and for every number of inputs: lane i
// of 16 accumulates columns i, i + 16, ... with fma, from zero in each kSumColumns columns; these
// partial vectors are added in order; T::sum adds the lanes; the bias comes last.
#pragma once

#include "kernels/cpu/decode_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Columns decoded to scratch before they are used: kTileRows * kDecodeColumns floats stay in L1.
constexpr std::int64_t kDecodeColumns = 512;
static_assert(kSumColumns <= kStretch && kSumColumns % kDecodeColumns == 0);
static_assert(kShortStretch <= kDecodeColumns && kDecodeColumns % kShortStretch == 0);

/// Writes values as float32, zero in the lanes beyond the last column (whose codes are padding and
/// whose scale may be anything). A sink of RowDecoder::run.
template <class T>
struct ScratchSink {
  float* out;
  void operator()(std::int64_t col, typename T::F v) const { T::store(out + col, v); }
  void tail(std::int64_t col, typename T::F v, std::int64_t n) const {
    T::store(out + col, T::zero());
    T::store_n(out + col, v, static_cast<int>(n));
  }
};

/// Columns [col, col + count) of a row as float32, zero-padded to a multiple of 16.
template <class T, class Decoder>
void decode_row(const Decoder& decoder, std::int64_t row, std::int64_t col, std::int64_t count,
                float* out) {
  const KernelMatrix& w = decoder.w;
  const std::int64_t step = stretch_columns(w);
  Stretch stats;
  for (std::int64_t c = 0; c < count; c += step) {
    const std::int64_t n = min64(step, count - c);
    expand_stretch<T>(w, row, col + c, n, stats);
    ScratchSink<T> sink{out + c};
    decoder.run(w.codes + row * w.code_bytes, col + c, n, stats, sink);
  }
}

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
template <class T, int kRows, class Decoder>
void product_rows(const Decoder& decoder, const MatmulJob& job, std::int64_t row) {
  using F = typename T::F;
  const std::int64_t cols = decoder.w.cols;
  alignas(64) float decoded[kRows * kDecodeColumns];
  F totals[kMaxInputRows * kRows];
  F acc[kMaxInputRows * kRows];
  const int lanes = job.inputs * kRows;
  for (int i = 0; i < lanes; ++i) totals[i] = T::zero();
  for (std::int64_t block = 0; block < cols; block += kSumColumns) {
    const std::int64_t block_end = min64(block + kSumColumns, cols);
    for (int i = 0; i < lanes; ++i) acc[i] = T::zero();
    for (std::int64_t c = block; c < block_end; c += kDecodeColumns) {
      const std::int64_t n = min64(kDecodeColumns, block_end - c);
      const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
      for (int r = 0; r < kRows; ++r) {
        if (row + r + kRows < decoder.w.rows) prefetch_row(decoder.w, row + r + kRows, c, n);
        decode_row<T>(decoder, row + r, c, n, decoded + r * kDecodeColumns);
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

/// True if every group of every row starts and ends on a whole strip, so that codes can be used in
/// registers without being stored as float32 first.
inline bool whole_strips(const KernelMatrix& w) {
  const std::int64_t strip = w.bits == 4 ? 32 : 16;
  return w.column_stats == 0 && w.group_size % strip == 0 && w.cols % w.group_size == 0;
}

/// Columns whose codes fill a cache line of 64 bytes.
constexpr std::int64_t kLineColumns4 = 128;
constexpr std::int64_t kLineColumns8 = 64;

/// One group of kRows rows against kInputs inputs, codes decoded in registers.
template <class T, int kRows, int kInputs, class Decoder>
struct GroupProduct {
  using F = typename T::F;
  using U = typename T::U;
  const Decoder& decoder;
  const float* x;
  std::int64_t ldx;
  const std::uint8_t* codes;  // column 0 of the first row
  std::int64_t ahead;         // bytes from a row to the row that is wanted next
  F (&acc)[kInputs][kRows];

  /// Short rows defeat the hardware's prefetcher: ask for the next rows' line at the same column.
  void prefetch(const std::uint8_t* strip) const {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(strip + r * decoder.w.code_bytes + ahead);
  }

  void four_bits(const Stretch* stats, std::int64_t slot, std::int64_t col,
                 std::int64_t end) const {
    F table[kRows];
    for (int r = 0; r < kRows; ++r) {
      table[r] = decoder.group_table(stats[r].scale[slot], stats[r].offset[slot]);
    }
    const std::int64_t ld = decoder.w.code_bytes;
    for (; col < end; col += 2 * kLanes) {
      const std::uint8_t* strip = codes + col / 2;
      if (col % kLineColumns4 == 0) prefetch(strip);
      U raw[kRows];
      for (int r = 0; r < kRows; ++r) raw[r] = T::load_u8(strip + r * ld);
      for (int m = 0; m < kInputs; ++m) {
        const F low = T::load(x + m * ldx + col);
        for (int r = 0; r < kRows; ++r) {
          acc[m][r] = T::fma(T::lookup16(table[r], raw[r]), low, acc[m][r]);
        }
      }
      for (int m = 0; m < kInputs; ++m) {
        const F high = T::load(x + m * ldx + col + kLanes);
        for (int r = 0; r < kRows; ++r) {
          const U index = T::template shr<4>(raw[r]);
          acc[m][r] = T::fma(T::lookup16(table[r], index), high, acc[m][r]);
        }
      }
    }
  }

  void eight_bits(const Stretch* stats, std::int64_t slot, std::int64_t col,
                  std::int64_t end) const {
    const std::int64_t ld = decoder.w.code_bytes;
    for (; col < end; col += kLanes) {
      F values[kRows];
      if (col % kLineColumns8 == 0) prefetch(codes + col);
      for (int r = 0; r < kRows; ++r) {
        const F c = T::sub(T::to_f(T::load_u8(codes + r * ld + col)), decoder.centre);
        values[r] = decoder.exact(c, T::set1(stats[r].scale[slot]), T::set1(stats[r].offset[slot]));
      }
      for (int m = 0; m < kInputs; ++m) {
        const F input = T::load(x + m * ldx + col);
        for (int r = 0; r < kRows; ++r) acc[m][r] = T::fma(values[r], input, acc[m][r]);
      }
    }
  }
};

/// Few inputs and whole strips: no scratch between codes and sums.
template <class T, int kRows, int kInputs, class Decoder>
void product_rows_direct(const Decoder& decoder, const MatmulJob& job, std::int64_t row) {
  using F = typename T::F;
  const KernelMatrix& w = decoder.w;
  Stretch stats[kRows];
  F totals[kInputs][kRows];
  F acc[kInputs][kRows];
  for (int i = 0; i < kInputs * kRows; ++i) totals[i / kRows][i % kRows] = T::zero();
  const std::int64_t ahead = row + 2 * kRows <= w.rows ? kRows * w.code_bytes : 0;
  const GroupProduct<T, kRows, kInputs, Decoder> product{
      decoder, job.x, job.ldx, w.codes + row * w.code_bytes, ahead, acc};
  for (std::int64_t block = 0; block < w.cols; block += kSumColumns) {
    const std::int64_t block_end = min64(block + kSumColumns, w.cols);
    for (int i = 0; i < kInputs * kRows; ++i) acc[i / kRows][i % kRows] = T::zero();
    for (int r = 0; r < kRows; ++r) {
      expand_stretch<T>(w, row + r, block, block_end - block, stats[r]);
    }
    std::int64_t end = min64(block + w.group_size - stats[0].phase, block_end);
    std::int64_t slot = 0;
    for (std::int64_t c = block; c < block_end; ++slot) {
      if (w.bits == 4) {
        product.four_bits(stats, slot, c, end);
      } else {
        product.eight_bits(stats, slot, c, end);
      }
      c = end;
      end = min64(end + w.group_size, block_end);
    }
    for (int i = 0; i < kInputs * kRows; ++i) {
      F& total = totals[i / kRows][i % kRows];
      total = T::add(total, acc[i / kRows][i % kRows]);
    }
  }
  for (int m = 0; m < kInputs; ++m) finish_outputs<T, kRows>(job, totals[m], m, row);
}

template <class T, int kRows, class Decoder>
void product_any(const Decoder& decoder, const MatmulJob& job, bool direct, std::int64_t row) {
  if (direct && job.inputs == 1) {
    constexpr int kStep = kRows < T::kDirectRows ? kRows : T::kDirectRows;
    static_assert(kRows % kStep == 0);
    for (int r = 0; r < kRows; r += kStep) product_rows_direct<T, kStep, 1>(decoder, job, row + r);
    return;
  }
  if (direct && job.inputs == 2) return product_rows_direct<T, kRows, 2>(decoder, job, row);
  if constexpr (T::kTileInputs >= 4) {
    if (direct && job.inputs == 3) return product_rows_direct<T, kRows, 3>(decoder, job, row);
    if (direct && job.inputs == 4) return product_rows_direct<T, kRows, 4>(decoder, job, row);
  }
  product_rows<T, kRows>(decoder, job, row);
}

template <class T>
void matmul_kernel(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                   std::int64_t row_end) {
  const bool direct = whole_strips(w);
  with_decoder<T>(w, [&job, direct, row_begin, row_end](const auto& decoder) {
    std::int64_t row = row_begin;
    for (; row + T::kTileRows <= row_end; row += T::kTileRows) {
      product_any<T, T::kTileRows>(decoder, job, direct, row);
    }
    for (; row < row_end; ++row) product_any<T, 1>(decoder, job, direct, row);
  });
}

}  // namespace
}  // namespace quantal

// Products of bfloat16 activations with weights rounded to bfloat16, sums in float32
// (cpu_kernels.h, Bf16Kernels).
//
// Order of a sum: each of 16 lanes adds its two products of every 32 packed columns in turn, from
// zero in each kSumColumns columns; sum_lanes adds the lanes, and these partial sums are added in
// order; the bias comes last. The order of columns depends on the matrix alone, so a row of outputs
// has the same bits whatever stands beside it.
#include "kernels/cpu/bf16_avx512_inl.h"

namespace quantal {
namespace {

constexpr std::int64_t kTileRows = 8;        // weight rows decoded at a time
constexpr std::int64_t kTileDepth = 512;     // columns decoded at a time: 8 KiB in all
constexpr std::int64_t kMaxTileInputs = 32;  // more go by panels (panels_avx512bf16.cpp)
constexpr std::int64_t kSubRows = 4;         // register tile: 4 weight rows x 4 activation rows
constexpr std::int64_t kScratchLd = kTileDepth + 32;  // rows begin in different sets of the cache
static_assert(kSumColumns == kStretch && kSumColumns % kTileDepth == 0);

/// Lines of codes to ask for while something else is multiplied, a few at a time: a burst would
/// wait for the processor's buffers. Rows are too short for the hardware's prefetcher.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const std::uint8_t* codes, std::int64_t ld, std::int64_t rows, std::int64_t bytes)
      : row_(codes), at_(codes), ld_(ld), rows_(rows), bytes_(bytes) {}
  [[gnu::always_inline]] void ask() {
    if (rows_ == 0) return;
    __builtin_prefetch(at_);
    at_ += 64;
    if (at_ - row_ < bytes_) return;
    row_ += ld_;
    at_ = row_;
    --rows_;
  }
  void ask_all() {
    while (rows_ != 0) ask();
  }

 private:
  const std::uint8_t* row_ = nullptr;
  const std::uint8_t* at_ = nullptr;
  std::int64_t ld_ = 0, rows_ = 0, bytes_ = 0;
};

/// acc[m][r] += w[r] x[m] over n (multiple of 64) columns.
template <int kRows, int kInputs>
void multiply(const std::uint16_t* w, const std::uint16_t* x, std::int64_t ldx, std::int64_t n,
              float* acc, Ahead& ahead_of_all) {
  Ahead ahead = ahead_of_all;
  __m512 sums[kInputs * kRows];  // in registers: every loop over it must be unrolled
#pragma GCC unroll 16
  for (int i = 0; i < kInputs * kRows; ++i) sums[i] = _mm512_load_ps(acc + i * kLanes);
  for (std::int64_t k = 0; k < n; k += 32) {
    ahead.ask();
    __m512i values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = load_512(w + r * kScratchLd + k);
#pragma GCC unroll 4
    for (int m = 0; m < kInputs; ++m) {
      const __m512i input = load_512(x + m * ldx + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_products(sums[m * kRows + r], values[r], input);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kInputs * kRows; ++i) _mm512_store_ps(acc + i * kLanes, sums[i]);
  ahead_of_all = ahead;
}

template <int kRows>
void multiply_inputs(std::int64_t inputs, const std::uint16_t* w, const std::uint16_t* x,
                     std::int64_t ldx, std::int64_t n, float* acc, Ahead& ahead) {
  switch (inputs) {
    case 1:
      return multiply<kRows, 1>(w, x, ldx, n, acc, ahead);
    case 2:
      return multiply<kRows, 2>(w, x, ldx, n, acc, ahead);
    case 3:
      return multiply<kRows, 3>(w, x, ldx, n, acc, ahead);
    default:
      return multiply<kRows, 4>(w, x, ldx, n, acc, ahead);
  }
}

/// Weight rows [row, row + rows), rows <= kTileRows, against all inputs.
class Tile {
 public:
  Tile(const KernelMatrix& w, const Bf16Job& job)
      : w_(w),
        job_(job),
        decode_(bf16_decoder(w)),
        stats_needed_(step_fields(w) != 0),
        sub_inputs_(register_inputs(job.inputs)) {}

  void run(std::int64_t row, std::int64_t rows) {
    if (stats_needed_) ask_for_stats(w_, row + rows, kTileRows);
    for (std::int64_t i = 0; i < job_.inputs * kTileRows; i += kLanes) {
      _mm512_store_ps(totals_ + i, _mm512_setzero_ps());
    }
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      for (std::int64_t i = 0; i < job_.inputs * kTileRows * kLanes; i += kLanes) {
        _mm512_store_ps(acc_ + i, _mm512_setzero_ps());
      }
      for (std::int64_t r = 0; stats_needed_ && r < rows; ++r) {
        expand_steps(w_, row + r, c, n, stats_[r]);
      }
      for (std::int64_t k = 0; k < n; k += kTileDepth)
        depth(row, rows, c, k, min64(kTileDepth, n - k));
      add_totals(rows);
    }
    for (std::int64_t m = 0; m < job_.inputs; ++m) {
      store_outputs(job_, totals_ + m * kTileRows, m, row, rows);
    }
  }

 private:
  /// Columns [c + k, c + k + n): decode, then multiply with all inputs.
  void depth(std::int64_t row, std::int64_t rows, std::int64_t c, std::int64_t k, std::int64_t n) {
    for (std::int64_t r = 0; r < rows; ++r) {
      decode_(w_, stats_[r], row + r, c, k, n, scratch_ + r * kScratchLd);
    }
    Ahead ahead = next_tile(row, c + k, n);
    const std::int64_t padded = (n + kPadColumns - 1) / kPadColumns * kPadColumns;
    float* acc = acc_;
    for (std::int64_t m = 0; m < job_.inputs; m += sub_inputs_) {
      const std::int64_t inputs = min64(sub_inputs_, job_.inputs - m);
      const std::uint16_t* x = job_.x + m * job_.ldx + c + k;
      std::int64_t r = 0;
      for (; r + kSubRows <= rows; r += kSubRows, acc += inputs * kSubRows * kLanes) {
        multiply_inputs<kSubRows>(inputs, scratch_ + r * kScratchLd, x, job_.ldx, padded, acc,
                                  ahead);
      }
      for (; r < rows; ++r, acc += inputs * kLanes) {
        multiply_inputs<1>(inputs, scratch_ + r * kScratchLd, x, job_.ldx, padded, acc, ahead);
      }
    }
    ahead.ask_all();
  }

  /// The same columns of the rows that come after these.
  Ahead next_tile(std::int64_t row, std::int64_t col, std::int64_t n) const {
    const std::int64_t rows = min64(kTileRows, w_.rows - row - kTileRows);
    if (rows <= 0) return {};
    return {w_.codes + (row + kTileRows) * w_.code_bytes + col * w_.bits / 8, w_.code_bytes, rows,
            n * w_.bits / 8};
  }

  void add_totals(std::int64_t rows) {
    const float* acc = acc_;
    for (std::int64_t m = 0; m < job_.inputs; m += sub_inputs_) {
      const std::int64_t inputs = min64(sub_inputs_, job_.inputs - m);
      std::int64_t r = 0;
      for (; r + kSubRows <= rows; r += kSubRows) {
        for (std::int64_t i = 0; i < inputs; ++i, acc += kSubRows * kLanes) {
          __m512 v[4];
          for (int j = 0; j < 4; ++j) v[j] = _mm512_load_ps(acc + j * kLanes);
          float* to = totals_ + (m + i) * kTileRows + r;
          _mm_store_ps(to, _mm_add_ps(_mm_load_ps(to), sum_lanes(v)));
        }
      }
      for (; r < rows; ++r) {
        for (std::int64_t i = 0; i < inputs; ++i, acc += kLanes) {
          const __m512 v[4] = {_mm512_load_ps(acc), _mm512_setzero_ps(), _mm512_setzero_ps(),
                               _mm512_setzero_ps()};
          totals_[(m + i) * kTileRows + r] += _mm_cvtss_f32(sum_lanes(v));
        }
      }
    }
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const DecodeBf16 decode_;
  const bool stats_needed_;
  const std::int64_t sub_inputs_;
  Stretch stats_[kTileRows];
  alignas(64) std::uint16_t scratch_[kTileRows * kScratchLd];
  alignas(64) float acc_[kMaxTileInputs * kTileRows * kLanes];
  alignas(64) float totals_[kMaxTileInputs * kTileRows];
};

void run_tiles(const KernelMatrix& w, const Bf16Job& job, std::int64_t row, std::int64_t row_end) {
  if (row == row_end) return;
  Tile tile(w, job);
  for (; row < row_end; row += kTileRows) tile.run(row, min64(kTileRows, row_end - row));
}

void matmul(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
            std::int64_t row_end) noexcept {
  if (has_sums_avx512bf16(w, job.inputs)) return matmul_sums_avx512bf16(w, job, row, row_end);
  if (has_lanes_avx512bf16(w, job.inputs)) return matmul_lanes_avx512bf16(w, job, row, row_end);
  if (job.inputs > kMaxTileInputs) return matmul_panels_avx512bf16(w, job, row, row_end);
  if (job.inputs <= kMaxDirectInputs && step_fields(w) != 0) {
    row = matmul_direct_avx512bf16(w, job, row, row_end);
  }
  run_tiles(w, job, row, row_end);
}

Bf16Tiles tiles(const KernelMatrix& w, std::int64_t inputs) noexcept {
  if (has_lanes_avx512bf16(w, inputs)) return lane_tiles_avx512bf16(w, inputs);
  return {has_sums_avx512bf16(w, inputs) ? sums_width_avx512bf16(w) : w.cols, inputs};
}

/// One row of activations: the order of columns in scratch, zero up to a multiple of 64.
void pack_row(const KernelMatrix& w, const std::uint16_t* in, std::uint16_t* out) {
  const std::int64_t fields = step_fields(w);
  const std::int64_t whole = fields > 1 ? w.cols : 0;
  const auto chunk = [](const std::uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  for (std::int64_t c = 0; c < whole;) {
    const std::int64_t here = fields_at(fields, c, w.cols);
    for (std::int64_t f = 0; f < here; ++f) {
      const __m512i low = _mm512_castsi256_si512(chunk(in + c + f * kLanes));
      _mm512_storeu_si512(out + c + 32 * f,
                          _mm512_inserti64x4(low, chunk(in + c + (here + f) * kLanes), 1));
    }
    c += 32 * here;
  }
  __builtin_memcpy(out + whole, in + whole, static_cast<std::size_t>(w.cols - whole) * 2);
  pad_columns(w.cols, out);
}

void pack(const KernelMatrix& w, std::int64_t inputs, const std::uint16_t* in, std::int64_t rows,
          std::uint16_t* out) noexcept {
  if (has_lanes_avx512bf16(w, inputs)) return pack_lanes_avx512bf16(w, in, rows, out);
  if (has_sums_avx512bf16(w, inputs)) return pack_sums_avx512bf16(w, in, out);
  pack_row(w, in, out);
}

}  // namespace

const Bf16Kernels& bf16_kernels_avx512bf16() {
  static constexpr Bf16Kernels kKernels = {tiles, pack, matmul, matmul_transposed_avx512bf16};
  return kKernels;
}

}  // namespace quantal

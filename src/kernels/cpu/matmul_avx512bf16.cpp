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
constexpr std::int64_t kSubInputs = 4;
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
    __m512bh values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = as_bf16(load_512(w + r * kScratchLd + k));
#pragma GCC unroll 4
    for (int m = 0; m < kInputs; ++m) {
      const __m512bh input = as_bf16(load_512(x + m * ldx + k));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512& sum = sums[m * kRows + r];
        sum = _mm512_dpbf16_ps(sum, values[r], input);
      }
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

/// y[m, row .. row + rows) from their sums in float32, rows <= kTileRows.
void store_outputs(const Bf16Job& job, const float* sums, std::int64_t m, std::int64_t row,
                   std::int64_t rows) {
  __m512 v = _mm512_maskz_loadu_ps(VecAvx512::first(static_cast<int>(rows)), sums);
  if (job.bias != nullptr) {
    v = _mm512_add_ps(
        v, _mm512_maskz_loadu_ps(VecAvx512::first(static_cast<int>(rows)), job.bias + row));
  }
  store_kind_n<VecAvx512>(FloatKind::kBF16, v, job.y + m * job.ldy + row, rows);
}

/// Weight rows [row, row + rows), rows <= kTileRows, against all inputs.
class Tile {
 public:
  Tile(const KernelMatrix& w, const Bf16Job& job)
      : w_(w), job_(job), decode_(bf16_decoder(w)), stats_needed_(step_fields(w) != 0) {}

  void run(std::int64_t row, std::int64_t rows) {
    for (std::int64_t i = 0; i < job_.inputs * kTileRows; i += kLanes) {
      _mm512_store_ps(totals_ + i, _mm512_setzero_ps());
    }
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      for (std::int64_t i = 0; i < job_.inputs * kTileRows * kLanes; i += kLanes) {
        _mm512_store_ps(acc_ + i, _mm512_setzero_ps());
      }
      for (std::int64_t r = 0; stats_needed_ && r < rows; ++r) {
        expand_stretch<VecBf16>(w_, row + r, c, n, stats_[r]);
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
    for (std::int64_t m = 0; m < job_.inputs; m += kSubInputs) {
      const std::int64_t inputs = min64(kSubInputs, job_.inputs - m);
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
    for (std::int64_t m = 0; m < job_.inputs; m += kSubInputs) {
      const std::int64_t inputs = min64(kSubInputs, job_.inputs - m);
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

// ------------------------------------------------------------------ no scratch: few inputs

constexpr std::int64_t kDirectRows = 4;
constexpr std::int64_t kMaxDirectInputs = 4;
/// Groups of a stretch, at most: of 32 columns.
constexpr std::int64_t kMaxGroups = kStretch / 32 + 1;

/// Codes of up to 4 bits, tables of all groups of a stretch made before.
template <class L>
class TableSource {
 public:
  using Step = L;
  using Group = __m512i;
  explicit TableSource(const KernelMatrix& /*w*/) {}
  void begin(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t n) {
    Stretch stats;
    for (std::int64_t r = 0; r < kDirectRows; ++r) {
      expand_stretch<VecBf16>(w, row + r, col, n, stats);
      build_bf16_tables(w, stats, n, tables_[r]);
    }
    phase_ = stats.phase;
  }
  std::int64_t phase() const { return phase_; }
  [[gnu::always_inline]] Group group(int r, std::int64_t slot) const {
    return load_table<L>(tables_[r] + slot * kLanes);
  }
  [[gnu::always_inline]] static void look_up(const std::uint8_t* codes, const Group& group,
                                             __m512i (&out)[L::kFields]) {
    L::look_up(codes, group, out);
  }

 private:
  alignas(64) std::uint16_t tables_[kDirectRows][kMaxGroups * kLanes + 32];
  std::int64_t phase_ = 0;
};

/// 8-bit codes, computed.
template <class S>
class NumberSource {
 public:
  using Step = S;
  using Group = typename S::Group;
  explicit NumberSource(const KernelMatrix& w) : step_(w) {}
  void begin(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t n) {
    for (std::int64_t r = 0; r < kDirectRows; ++r) {
      expand_stretch<VecBf16>(w, row + r, col, n, stats_[r]);
    }
  }
  std::int64_t phase() const { return stats_[0].phase; }
  [[gnu::always_inline]] Group group(int r, std::int64_t slot) const {
    return S::group(stats_[r], slot);
  }
  [[gnu::always_inline]] void look_up(const std::uint8_t* codes, const Group& group,
                                      __m512i (&out)[1]) const {
    step_.look_up(codes, group, out);
  }

 private:
  const S step_;
  Stretch stats_[kDirectRows];
};

/// kDirectRows rows of codes against kInputs inputs, values in registers. Same order of a sum as in
/// tiles.
template <class Source, int kInputs>
class Direct {
 public:
  Direct(const KernelMatrix& w, const Bf16Job& job) : w_(w), job_(job), source_(w) {}

  void run(std::int64_t row) {
    __m128 totals[kInputs];
    for (__m128& t : totals) t = _mm_setzero_ps();
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      source_.begin(w_, row, c, n);
      __m512 sums[kInputs][kDirectRows];
      accumulate(row, c, n, sums);
      for (int m = 0; m < kInputs; ++m) totals[m] = _mm_add_ps(totals[m], sum_lanes(sums[m]));
    }
    for (int m = 0; m < kInputs; ++m) {
      float out[kDirectRows];
      _mm_storeu_ps(out, totals[m]);
      store_outputs(job_, out, m, row, kDirectRows);
    }
  }

 private:
  using Step = typename Source::Step;
  using Group = typename Source::Group;

  void accumulate(std::int64_t row, std::int64_t col, std::int64_t n,
                  __m512 (&out)[kInputs][kDirectRows]) const {
    const std::uint8_t* codes =
        w_.codes + row * w_.code_bytes + col / Step::kColumns * Step::kBytes;
    const std::uint16_t* x = job_.x + col;
    const std::int64_t ahead = row + 2 * kDirectRows <= w_.rows ? kDirectRows * w_.code_bytes : 0;
    const std::int64_t steps = w_.group_size * Step::kGroupsOfStep / Step::kColumns;
    std::int64_t left = n / Step::kColumns;
    std::int64_t here = steps - source_.phase() / Step::kColumns;
    __m512 sums[kInputs * kDirectRows];
#pragma GCC unroll 16
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (std::int64_t slot = 0; left > 0; slot += Step::kGroupsOfStep, here = steps) {
      Group groups[kDirectRows];
#pragma GCC unroll 4
      for (int r = 0; r < kDirectRows; ++r) groups[r] = source_.group(r, slot);
      here = min64(here, left);
      left -= here;
      for (; here > 0; --here, codes += Step::kBytes, x += Step::kColumns) {
        add_step(codes, ahead, x, groups, sums);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kInputs * kDirectRows; ++i) out[i / kDirectRows][i % kDirectRows] = sums[i];
  }

  [[gnu::always_inline]] void add_step(const std::uint8_t* codes, std::int64_t ahead,
                                       const std::uint16_t* x, const Group (&groups)[kDirectRows],
                                       __m512 (&sums)[kInputs * kDirectRows]) const {
    const bool new_line = (reinterpret_cast<std::uintptr_t>(codes) & 63U) < Step::kBytes;
#pragma GCC unroll 4
    for (int r = 0; r < kDirectRows; ++r) {
      const std::uint8_t* from = codes + r * w_.code_bytes;
      if (new_line) __builtin_prefetch(from + ahead);  // as Ahead
      __m512i values[Step::kFields];
      source_.look_up(from, groups[r], values);
#pragma GCC unroll 4
      for (int f = 0; f < Step::kFields; ++f) {
#pragma GCC unroll 4
        for (int m = 0; m < kInputs; ++m) {
          const __m512bh input = as_bf16(load_512(x + m * job_.ldx + 32 * f));
          __m512& sum = sums[m * kDirectRows + r];
          sum = _mm512_dpbf16_ps(sum, as_bf16(values[f]), input);
        }
      }
    }
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  Source source_;
};

template <class Source, int kInputs>
std::int64_t direct_rows(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                         std::int64_t row_end) {
  Direct<Source, kInputs> product(w, job);
  for (; row + kDirectRows <= row_end; row += kDirectRows) product.run(row);
  return row;
}

template <class Source>
std::int64_t direct_inputs(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                           std::int64_t row_end) {
  switch (job.inputs) {
    case 1:
      return direct_rows<Source, 1>(w, job, row, row_end);
    case 2:
      return direct_rows<Source, 2>(w, job, row, row_end);
    case 3:
      return direct_rows<Source, 3>(w, job, row, row_end);
    default:
      return direct_rows<Source, 4>(w, job, row, row_end);
  }
}

void matmul(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
            std::int64_t row_end) noexcept {
  if (job.inputs > kMaxTileInputs) return matmul_panels_avx512bf16(w, job, row, row_end);
  if (job.inputs <= kMaxDirectInputs && step_fields(w) != 0) {
    if (w.bits == 8) {
      with_numbers(w,
                   [&]<class S>() { row = direct_inputs<NumberSource<S>>(w, job, row, row_end); });
    } else {
      with_lookup(w, [&]<class L>() { row = direct_inputs<TableSource<L>>(w, job, row, row_end); });
    }
  }
  run_tiles(w, job, row, row_end);
}

/// One row of activations: the order of columns in scratch, zero up to a multiple of 64.
void pack(const KernelMatrix& w, const std::uint16_t* in, std::uint16_t* out) noexcept {
  const std::int64_t fields = step_fields(w);
  const std::int64_t step = 32 * fields;
  const std::int64_t whole = fields > 1 ? w.cols : 0;
  const auto chunk = [](const std::uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  for (std::int64_t c = 0; c < whole; c += step) {
    for (std::int64_t f = 0; f < fields; ++f) {
      const __m512i low = _mm512_castsi256_si512(chunk(in + c + f * kLanes));
      _mm512_storeu_si512(out + c + 32 * f,
                          _mm512_inserti64x4(low, chunk(in + c + (fields + f) * kLanes), 1));
    }
  }
  __builtin_memcpy(out + whole, in + whole, static_cast<std::size_t>(w.cols - whole) * 2);
  pad_columns(w.cols, out);
}

}  // namespace

const Bf16Kernels& bf16_kernels_avx512bf16() {
  static constexpr Bf16Kernels kKernels = {pack, matmul, matmul_transposed_avx512bf16};
  return kKernels;
}

}  // namespace quantal

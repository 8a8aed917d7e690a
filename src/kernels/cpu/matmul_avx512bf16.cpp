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

/// Inputs of one register tile: at most kSubInputs, tiles of nearly equal size.
constexpr std::int64_t register_inputs(std::int64_t inputs) {
  const std::int64_t tiles = (inputs + kSubInputs - 1) / kSubInputs;
  return (inputs + tiles - 1) / tiles;
}

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

/// Statistics are read all at once before the codes: unless they were asked for, that waits for
/// memory.
inline void ask_for_stats(const KernelMatrix& w, std::int64_t row, std::int64_t rows) {
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  const std::int64_t bytes = min64(rows, w.rows - row) * w.stat_bytes;
  for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(stats + byte);
}

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

// ------------------------------------------------------------------ no scratch: few inputs

constexpr std::int64_t kMaxDirectInputs = 11;
constexpr int kDirectRows = 4;
/// Columns of which tables are made at a time, and their groups at most: of 32 columns, beginning
/// anywhere, an even number.
constexpr std::int64_t kPartColumns = 2048;
constexpr std::int64_t kMaxGroups = kPartColumns / 32 + 2;

/// Codes of up to 4 bits, tables of all groups of some columns made before.
template <class L>
class TableSource {
 public:
  using Step = L;
  explicit TableSource(const KernelMatrix& w)
      : codes_(_mm512_loadu_ps(w.table)),
        group_size_(w.group_size),
        build_(bf16_table_builder(w)) {}

  /// Statistics of columns [col, col + n), n <= kStretch.
  void begin(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t n) {
    for (int r = 0; r < kDirectRows; ++r) expand_steps(w, row + r, col, n, stats_[r]);
  }
  /// Columns [k, k + n) of these, n <= kPartColumns. Returns the position of k in slot 0.
  std::int64_t part(std::int64_t k, std::int64_t n) {
    const std::int64_t at = stats_[0].phase + k;
    const std::int64_t first = group_of(at);
    const std::int64_t groups = group_of(at + n - 1) - first + 1;
    build_(codes_, stats_, kDirectRows, first, groups, tables_[0], kMaxGroups * kLanes);
    return at - first * group_size_;
  }
  [[gnu::always_inline]] void look_up(const std::uint8_t* codes, int r, std::int64_t slot,
                                      __m512i (&out)[L::kFields]) const {
    L::look_up(codes, load_table<L>(tables_[r] + slot * kLanes), out);
  }

 private:
  /// Divisions of 32 bits are faster; columns of a stretch have few.
  std::int64_t group_of(std::int64_t column) const {
    return static_cast<std::uint32_t>(column) / static_cast<std::uint32_t>(group_size_);
  }

  const __m512 codes_;
  const std::int64_t group_size_;
  const BuildBf16Tables build_;
  Stretch stats_[kDirectRows];
  alignas(64) std::uint16_t tables_[kDirectRows][kMaxGroups * kLanes];
};

/// Codes of more than 4 bits, computed.
template <class S>
class NumberSource {
 public:
  using Step = S;
  explicit NumberSource(const KernelMatrix& w) : step_(w), slot_size_(slot_columns(w)) {}

  void begin(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t n) {
    for (int r = 0; r < kDirectRows; ++r) expand_steps(w, row + r, col, n, stats_[r]);
  }
  std::int64_t part(std::int64_t k, std::int64_t /*n*/) {
    first_ = (stats_[0].phase + k) / slot_size_;
    return stats_[0].phase + k - first_ * slot_size_;
  }
  [[gnu::always_inline]] void look_up(const std::uint8_t* codes, int r, std::int64_t slot,
                                      __m512i (&out)[S::kFields]) const {
    step_.look_up(codes, S::group(stats_[r], first_ + slot), out);
  }

 private:
  const S step_;
  const std::int64_t slot_size_;
  std::int64_t first_ = 0;
  Stretch stats_[kDirectRows];
};

/// kDirectRows rows of codes against up to kMaxDirectInputs inputs, values in registers. Same order
/// of a sum as in tiles.
template <class Source>
class Direct {
 public:
  Direct(const KernelMatrix& w, const Bf16Job& job)
      : w_(w), job_(job), sub_inputs_(register_inputs(job.inputs)), source_(w) {}

  void run(std::int64_t row) {
    for (std::int64_t i = 0; i < job_.inputs; ++i) {
      for (std::int64_t r = 0; r < kDirectRows; ++r) totals_[i][r] = 0.0F;
    }
    ask_for_stats(w_, row + kDirectRows, kDirectRows);
    ahead_ = w_.codes + (row + kDirectRows) * w_.code_bytes;
    end_ = ahead_ + min64(kDirectRows, w_.rows - row - kDirectRows) * w_.code_bytes;
    for (std::int64_t c = 0; c < w_.cols; c += kSumColumns) {
      const std::int64_t n = min64(kSumColumns, w_.cols - c);
      source_.begin(w_, row, c, n);
      for (std::int64_t i = 0; i < job_.inputs * kDirectRows; ++i) sums_[i] = _mm512_setzero_ps();
      for (std::int64_t k = 0; k < n; k += kPartColumns) {
        const std::int64_t count = min64(kPartColumns, n - k);
        add_inputs(row, c + k, count, source_.part(k, count));
      }
      add_totals();
    }
    for (std::int64_t m = 0; m < job_.inputs; ++m) {
      store_outputs(job_, totals_[m], m, row, kDirectRows);
    }
  }

 private:
  using Step = typename Source::Step;

  /// Some inputs at a time: looking codes up again costs less than storing what they stand for.
  void add_inputs(std::int64_t row, std::int64_t col, std::int64_t n, std::int64_t phase) {
    for (std::int64_t m = 0; m < job_.inputs; m += sub_inputs_) {
      const std::int64_t inputs = min64(sub_inputs_, job_.inputs - m);
      constexpr decltype(&Direct::accumulate<1>) kOf[] = {
          &Direct::accumulate<1>, &Direct::accumulate<2>, &Direct::accumulate<3>,
          &Direct::accumulate<4>};
      (this->*kOf[inputs - 1])(row, col, n, phase, m);
    }
  }

  template <int kInputs>
  void accumulate(std::int64_t row, std::int64_t col, std::int64_t n, std::int64_t phase,
                  std::int64_t m) {
    const std::uint8_t* codes =
        w_.codes + row * w_.code_bytes + col / Step::kColumns * Step::kBytes;
    const std::uint16_t* x = job_.x + m * job_.ldx + col;
    const std::int64_t steps = slot_columns(w_) * Step::kGroupsOfStep / Step::kColumns;
    const std::int64_t left = n / Step::kColumns;
    __m512* const kept = sums_ + m * kDirectRows;
    if constexpr (2 * Step::kBytes == 64) {
      if (steps == 1) return one_step_groups<kInputs>(codes, x, left, kept);
    }
    any_groups<kInputs>(codes, x, left, steps, steps - phase / Step::kColumns, kept);
  }

  /// The sums of kInputs inputs in registers: every loop over them must be unrolled.
  template <int kInputs>
  struct Sums {
    __m512 of[kInputs][kDirectRows];

    [[gnu::always_inline]] explicit Sums(const __m512* kept) {
#pragma GCC unroll 16
      for (int i = 0; i < kInputs * kDirectRows; ++i)
        of[i / kDirectRows][i % kDirectRows] = kept[i];
    }
    [[gnu::always_inline]] void store(__m512* kept) const {
#pragma GCC unroll 16
      for (int i = 0; i < kInputs * kDirectRows; ++i)
        kept[i] = of[i / kDirectRows][i % kDirectRows];
    }
  };

  void add_totals() {
    for (std::int64_t m = 0; m < job_.inputs; ++m) {
      const __m512* from = sums_ + m * kDirectRows;
      const __m512 of_rows[kDirectRows] = {from[0], from[1], from[2], from[3]};
      _mm_storeu_ps(totals_[m], _mm_add_ps(_mm_loadu_ps(totals_[m]), sum_lanes(of_rows)));
    }
  }

  /// Groups (or pairs of them) of one step, two steps a line.
  template <int kInputs>
  [[gnu::noinline]] void one_step_groups(const std::uint8_t* codes, const std::uint16_t* x,
                                         std::int64_t left, __m512* kept) {
    Sums<kInputs> sums(kept);
    std::int64_t slot = 0;
    for (; left >= 2; left -= 2, slot += 2 * Step::kGroupsOfStep) {
      ask();
      add_step(codes, x, slot, sums.of);
      add_step(codes + Step::kBytes, x + Step::kColumns, slot + Step::kGroupsOfStep, sums.of);
      codes += 2 * Step::kBytes;
      x += 2 * Step::kColumns;
    }
    if (left != 0) add_step(codes, x, slot, sums.of);
    sums.store(kept);
  }

  /// `here` steps of the first group.
  template <int kInputs>
  [[gnu::noinline]] void any_groups(const std::uint8_t* codes, const std::uint16_t* x,
                                    std::int64_t left, std::int64_t steps, std::int64_t here,
                                    __m512* kept) {
    Sums<kInputs> sums(kept);
    for (std::int64_t slot = 0; left > 0; slot += Step::kGroupsOfStep, here = steps) {
      here = min64(here, left);
      left -= here;
      for (; here > 0; --here, codes += Step::kBytes, x += Step::kColumns) {
        if ((reinterpret_cast<std::uintptr_t>(codes) & 63U) < Step::kBytes) ask();
        if constexpr (Step::kBytes > 64) {
          if ((reinterpret_cast<std::uintptr_t>(codes) & 63U) > 128 - Step::kBytes) ask();
        }
        add_step(codes, x, slot, sums.of);
      }
    }
    sums.store(kept);
  }

  /// As Ahead; the next rows are one run of memory and are asked for in its order, as many lines as
  /// are used.
  [[gnu::always_inline]] void ask() {
    if (ahead_ >= end_) return;
#pragma GCC unroll 4
    for (int r = 0; r < kDirectRows; ++r) __builtin_prefetch(ahead_ + 64 * r);
    ahead_ += 64 * kDirectRows;
  }

  template <int kInputs>
  [[gnu::always_inline]] void add_step(const std::uint8_t* codes, const std::uint16_t* x,
                                       std::int64_t slot,
                                       __m512 (&sums)[kInputs][kDirectRows]) const {
#pragma GCC unroll 4
    for (int r = 0; r < kDirectRows; ++r) {
      __m512i values[Step::kFields];
      source_.look_up(codes + r * w_.code_bytes, r, slot, values);
#pragma GCC unroll 4
      for (int f = 0; f < Step::kFields; ++f) {
#pragma GCC unroll 4
        for (int m = 0; m < kInputs; ++m) {
          add_products(sums[m][r], values[f], load_512(x + m * job_.ldx + 32 * f));
        }
      }
    }
  }

  const KernelMatrix& w_;
  const Bf16Job& job_;
  const std::int64_t sub_inputs_;
  Source source_;
  const std::uint8_t* ahead_ = nullptr;
  const std::uint8_t* end_ = nullptr;
  __m512 sums_[kMaxDirectInputs * kDirectRows];
  float totals_[kMaxDirectInputs][kDirectRows];
};

/// Returns the first row that is left.
template <class Source>
std::int64_t direct_rows(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                         std::int64_t row_end) {
  Direct<Source> product(w, job);
  for (; row + kDirectRows <= row_end; row += kDirectRows) product.run(row);
  return row;
}

void matmul(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
            std::int64_t row_end) noexcept {
  if (job.inputs > kMaxTileInputs) return matmul_panels_avx512bf16(w, job, row, row_end);
  if (job.inputs <= kMaxDirectInputs && step_fields(w) != 0) {
    if (w.bits > 4) {
      with_numbers(w, [&]<class S>() { row = direct_rows<NumberSource<S>>(w, job, row, row_end); });
    } else {
      with_lookup(w, [&]<class L>() { row = direct_rows<TableSource<L>>(w, job, row, row_end); });
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

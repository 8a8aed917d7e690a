// Products of few bfloat16 activations with weights rounded to bfloat16 (cpu_kernels.h,
// Bf16Kernels): values of codes go from registers into products. The order of a sum is that of
// matmul_avx512bf16.cpp.
#include "kernels/cpu/bf16_avx512_inl.h"

namespace quantal {
namespace {

constexpr int kDirectRows = 4;
/// Columns of which tables are made at a time.
constexpr std::int64_t kPartColumns = 2048;

/// Codes of up to 4 bits, tables of all groups of some columns made before.
template <class L>
class TableSource {
 public:
  using Step = L;
  explicit TableSource(const KernelMatrix& w)
      : codes_(_mm512_loadu_ps(w.table)),
        slot_size_(slot_columns<Step>(w)),
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
    return at - first * slot_size_;
  }
  template <class S>  // L or its half
  [[gnu::always_inline]] void look_up(const std::uint8_t* codes, int r, std::int64_t slot,
                                      __m512i (&out)[S::kFields]) const {
    S::look_up(codes, load_tables<S>(tables_[r] + slot * kLanes), out);
  }

 private:
  /// Groups of a part at most: they begin anywhere, an even number.
  static constexpr std::int64_t kMaxGroups =
      kPartColumns / (L::kTables == StepTables::kChunks ? 16 : 32) + 2;

  /// Divisions of 32 bits are faster; columns of a stretch have few.
  std::int64_t group_of(std::int64_t column) const {
    return static_cast<std::uint32_t>(column) / static_cast<std::uint32_t>(slot_size_);
  }

  const __m512 codes_;
  const std::int64_t slot_size_;
  const BuildBf16Tables build_;
  Stretch stats_[kDirectRows];
  alignas(64) std::uint16_t tables_[kDirectRows][kMaxGroups * kLanes];
};

/// Codes of more than 4 bits, computed.
template <class S>
class NumberSource {
 public:
  using Step = S;
  explicit NumberSource(const KernelMatrix& w)
      : step_(w), half_(w), slot_size_(slot_columns<Step>(w)) {}

  void begin(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t n) {
    for (int r = 0; r < kDirectRows; ++r) expand_steps(w, row + r, col, n, stats_[r]);
  }
  std::int64_t part(std::int64_t k, std::int64_t /*n*/) {
    first_ = (stats_[0].phase + k) / slot_size_;
    return stats_[0].phase + k - first_ * slot_size_;
  }
  template <class Part>  // S or its half
  [[gnu::always_inline]] void look_up(const std::uint8_t* codes, int r, std::int64_t slot,
                                      __m512i (&out)[Part::kFields]) const {
    const auto group = Part::group(stats_[r], first_ + slot);
    if constexpr (Part::kFields == S::kFields) return step_.look_up(codes, group, out);
    if constexpr (Part::kFields != S::kFields) half_.look_up(codes, group, out);
  }

 private:
  const S step_;
  const typename S::Half half_;
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
    const std::int64_t steps = slot_columns<Step>(w_) * Step::kGroupsOfStep / Step::kColumns;
    const std::int64_t left = n / Step::kColumns;
    __m512* const kept = sums_ + m * kDirectRows;
    bool done = false;
    if constexpr (2 * Step::kBytes == 64) {
      done = steps == 1;
      if (done) one_step_groups<kInputs>(codes, x, left, kept);
    }
    if (!done) any_groups<kInputs>(codes, x, left, steps, steps - phase / Step::kColumns, kept);
    if constexpr (Step::kFields > 1) {
      const std::int64_t whole = left * Step::kColumns;
      if (whole == n) return;
      half_step<kInputs>(codes + left * Step::kBytes, x + whole,
                         (phase + whole) / slot_columns<Step>(w_), kept);
    }
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
      add_step<Step>(codes, x, slot, sums.of);
      add_step<Step>(codes + Step::kBytes, x + Step::kColumns, slot + Step::kGroupsOfStep, sums.of);
      codes += 2 * Step::kBytes;
      x += 2 * Step::kColumns;
    }
    if (left != 0) add_step<Step>(codes, x, slot, sums.of);
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
        add_step<Step>(codes, x, slot, sums.of);
      }
    }
    sums.store(kept);
  }

  template <int kInputs>
  [[gnu::noinline]] void half_step(const std::uint8_t* codes, const std::uint16_t* x,
                                   std::int64_t slot, __m512* kept) {
    Sums<kInputs> sums(kept);
    ask();
    add_step<typename Step::Half>(codes, x, slot, sums.of);
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

  template <class Part, int kInputs>  // Part is Step or its half
  [[gnu::always_inline]] void add_step(const std::uint8_t* codes, const std::uint16_t* x,
                                       std::int64_t slot,
                                       __m512 (&sums)[kInputs][kDirectRows]) const {
#pragma GCC unroll 4
    for (int r = 0; r < kDirectRows; ++r) {
      __m512i values[Part::kFields];
      source_.template look_up<Part>(codes + r * w_.code_bytes, r, slot, values);
#pragma GCC unroll 4
      for (int f = 0; f < Part::kFields; ++f) {
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

}  // namespace

std::int64_t matmul_direct_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row,
                                      std::int64_t row_end) noexcept {
  if (w.bits > 4) {
    with_numbers(w, [&]<class S>() { row = direct_rows<NumberSource<S>>(w, job, row, row_end); });
  } else {
    with_lookup(w, [&]<class L>() { row = direct_rows<TableSource<L>>(w, job, row, row_end); });
  }
  return row;
}

}  // namespace quantal

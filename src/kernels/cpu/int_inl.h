// Products of int8 activations with packed codes (int_kernels.h): a lane is a weight row.
//
// Codes are unpacked to a panel (int_codes_inl.h): element [k / 4][row] holds columns k .. k + 3 of
// a row. A register tile multiplies two vectors of rows with up to V::kInputs rows of activations;
// scales enter once per run, for all rows of a vector together. For one or two rows of activations
// there is no panel (int_direct_inl.h).
//
// T is a vector type of 16 lanes (vec_*.h), V as in int_codes_inl.h.
#pragma once

#include "kernels/cpu/codes_inl.h"
#include "kernels/cpu/int_direct_inl.h"
#include "kernels/cpu/int_stats_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

// ------------------------------------------------------------------ activations

/// Run r of a row: n <= 16 * kChunks elements, more than 16 * (kChunks - 1).
template <class T, int kChunks>
void quantize_run(const IntForm& form, FloatKind kind, const std::uint8_t* x, std::int64_t n,
                  std::int64_t r, const IntRow& out) noexcept {
  using F = typename T::F;
  const std::int64_t bytes = kLanes * float_bytes(kind);
  F values[kChunks];
  F most = T::zero();
#pragma GCC unroll 8
  for (int k = 0; k < kChunks; ++k) {
    values[k] = k + 1 < kChunks ? load_kind<T>(kind, x + k * bytes)
                                : load_kind_n<T>(kind, x + k * bytes, n - k * kLanes);
    most = T::max(T::abs(values[k]), most);  // passes over NaN
  }
  const float largest = T::reduce_max(most);
  const bool some = largest >= kTinyRun;
  const F factor = T::set1(some ? kMaxIntLevel / largest : 0.0F);
  F sum = T::zero();
  std::uint8_t codes[kChunks * kLanes];
#pragma GCC unroll 8
  for (int k = 0; k < kChunks; ++k) {
    const F q = T::rint(T::mul(values[k], factor));
    sum = T::add(sum, q);  // exact: below 2^24
    T::store_u8(codes + k * kLanes, T::to_i(q));
  }
  float total = T::sum(sum);
  float scale = some ? largest / kMaxIntLevel : 0.0F;
  if (total != total) {  // a product was NaN: x holds a NaN or an infinity
    scale = total;
    total = 0.0F;
    for (std::uint8_t& code : codes) code = 0;
  }
  std::int32_t* q = out.q + r * form.run / 4 * out.tile;
  for (int i = 0; i < kChunks * kLanes; i += 4, q += out.tile) __builtin_memcpy(q, codes + i, 4);
  out.scale[r * out.tile] = scale;
  out.total[r * out.tile] = scale * total;
  out.start[r * out.tile] = -form.centre * static_cast<std::int32_t>(total);
}

/// Rows in turn for each run: their elements alternate in few lines of the cache.
template <class T>
void quantize_int_tile(const IntForm& form, FloatKind kind, const void* x, std::int64_t cols,
                       const IntRow& out) noexcept {
  const auto* bytes = static_cast<const std::uint8_t*>(x);
  const std::int64_t size = float_bytes(kind);
  for (std::int64_t begin = 0, r = 0; begin < cols; begin += form.run, ++r) {
    const std::int64_t n = min64(form.run, cols - begin);
    const auto run = [&](auto chunks) {
      IntRow row = out;
      for (std::int64_t m = 0; m < out.tile; ++m, ++row.q, ++row.scale, ++row.total, ++row.start) {
        quantize_run<T, decltype(chunks)::kBits>(form, kind, bytes + (m * cols + begin) * size, n,
                                                 r, row);
      }
    };
    switch ((n + kLanes - 1) / kLanes) {
      case 1:
        run(Width<1>{});
        break;
      case 2:
        run(Width<2>{});
        break;
      case 3:
        run(Width<3>{});
        break;
      case 4:
        run(Width<4>{});
        break;
      case 5:
        run(Width<5>{});
        break;
      case 6:
        run(Width<6>{});
        break;
      case 7:
        run(Width<7>{});
        break;
      default:
        run(Width<8>{});
    }
  }
}

// ------------------------------------------------------------------ register tiles

/// sum[input][half] += what run r adds, whose statistics of activations begin at `at`. Sums stand
/// in `sum` or, where registers do not suffice for them beside dot, in memory.
template <class V, int kInputs, bool kOffsets>
[[gnu::always_inline]] inline void add_run(const IntPanel& p, const IntJob& job, std::int64_t r,
                                           std::int64_t at, const typename V::I (&dot)[2 * kInputs],
                                           typename V::F (&sum)[2 * kInputs], float* sums) {
  using F = typename V::F;
  // All that is read stands in registers and pointers before sums are written, which might alias.
  const F a[2] = {V::load_f(p.a[r]), V::load_f(p.a[r] + V::kLanes)};
  F b[2] = {a[0], a[1]};
  if constexpr (kOffsets) {
    b[0] = V::load_f(p.b[r]);
    b[1] = V::load_f(p.b[r] + V::kLanes);
  }
  const float* const scales = job.x.scale + at;
  const float* const totals = job.x.total + at;
#pragma GCC unroll 12
  for (int i = 0; i < kInputs; ++i) {
    const F scale = V::set1_f(scales[i]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      F& held = sum[2 * i + h];
      float* const to = sums + (2 * i + h) * V::kLanes;
      if constexpr (!V::kHoldSums) held = V::load_f(to);
      held = V::fma(V::mul(a[h], scale), V::to_f(dot[2 * i + h]), held);
      if constexpr (kOffsets) held = V::fma(b[h], V::set1_f(totals[i]), held);
      if constexpr (!V::kHoldSums) V::store_f(to, held);
    }
  }
  // Else the compiler keeps sums of all runs in variables, more than there are registers.
  if constexpr (!V::kHoldSums) __asm__ volatile("" ::: "memory");
}

/// sums[m][rows] += what the panel adds, for the tile of kInputs rows of activations from m on.
template <class V, int kInputs, bool kWide, bool kOffsets>
void multiply_int(const IntPanel& p, const IntJob& job, std::int64_t m, IntRows& rows,
                  float* sums) {
  using I = typename V::I;
  constexpr std::int64_t kRows = 2 * V::kLanes;
  const std::int32_t* codes = p.codes;
  const std::int32_t* x = job.x.q + m * job.ldq + p.col / 4 * kInputs;
  std::int64_t at = m * job.ldr + p.first_run * kInputs;
  typename V::F sum[2 * kInputs];  // in registers, as dot: every loop over them must be unrolled
  if constexpr (V::kHoldSums) {
#pragma GCC unroll 12
    for (int i = 0; i < 2 * kInputs; ++i) sum[i] = V::load_f(sums + i * V::kLanes);
  }
  for (std::int64_t r = 0; r < p.runs; ++r, at += kInputs) {
    I dot[2 * kInputs];
#pragma GCC unroll 12
    for (int i = 0; i < kInputs; ++i) {
      dot[2 * i] = dot[2 * i + 1] = V::set1_i(job.x.start[at + i]);
    }
    const std::int64_t words = r + 1 == p.runs ? p.last_words : p.words;
    if (m == 0) {  // while the first tile is multiplied
      for (std::int64_t k = 0; k < p.ask_lines; k += 2) rows.template ask<2>();
    }
    for (std::int64_t k = 0; k < words; ++k, codes += kRows, x += kInputs) {
      const I first = V::load_i(codes);
      const I second = V::load_i(codes + V::kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kInputs; ++i) {
        const I input = V::set1_i(x[i]);
        dot[2 * i] = V::template dot<kWide>(dot[2 * i], first, input);
        dot[2 * i + 1] = V::template dot<kWide>(dot[2 * i + 1], second, input);
      }
    }
    add_run<V, kInputs, kOffsets>(p, job, r, at, dot, sum, sums);
  }
  if constexpr (V::kHoldSums) {
#pragma GCC unroll 12
    for (int i = 0; i < 2 * kInputs; ++i) V::store_f(sums + i * V::kLanes, sum[i]);
  }
}

/// `inputs` <= kInputs rows of activations from m on.
template <class V, bool kWide, bool kOffsets, int kInputs>
void multiply_inputs(std::int64_t inputs, const IntPanel& p, const IntJob& job, std::int64_t m,
                     IntRows& rows, float* sums) {
  if constexpr (kInputs > 1) {
    if (inputs < kInputs) {
      return multiply_inputs<V, kWide, kOffsets, kInputs - 1>(inputs, p, job, m, rows, sums);
    }
  }
  multiply_int<V, kInputs, kWide, kOffsets>(p, job, m, rows, sums);
}

// ------------------------------------------------------------------ products

/// Rows of weights against all inputs.
template <class T, class V>
class IntProduct {
 public:
  static constexpr std::int64_t kRows = 2 * V::kLanes;

  IntProduct(const KernelMatrix& w, const IntJob& job)
      : w_(w),
        job_(job),
        direct_(direct_product<V>(w, job)),
        fill_(panel_filler<V>(w, *job.form)),
        multiply_(tile(w, *job.form)),
        slots_(w, job.form->unit),
        panel_(static_cast<std::int32_t*>(job.scratch)),
        a_(reinterpret_cast<float*>(panel_ + kIntPanelColumns / 4 * kRows)),
        b_(a_ + kSlots * kRows),
        sums_(b_ + kSlots * kRows) {
    static_assert(
        4 * (kIntPanelColumns / 4 * kRows + 2 * kSlots * kRows + kMaxIntInputs * kRows + kLanes) <=
        kIntScratchBytes);
    rows_.code_bytes = w.code_bytes;
  }

  /// Asks for the first rows, which no others come before.
  void ask_for_first(std::int64_t row) const {
    const std::int64_t rows = min64(kRows, w_.rows - row);
    const std::uint8_t* const stats = w_.stats + row * w_.stat_bytes;
    for (std::int64_t i = 0; i < rows * w_.stat_bytes; i += 64) __builtin_prefetch(stats + i, 0, 2);
    const std::uint8_t* const codes = w_.codes + row * w_.code_bytes;
    for (std::int64_t i = 0; i < rows * w_.code_bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
  }
  /// Rows [row, row + rows), rows <= kRows. Rows that are missing repeat the last one.
  void run(std::int64_t row, std::int64_t rows) {
    const std::int64_t later = min64(kRows, w_.rows - row - rows);
    for (std::int64_t r = 0; r < kRows; ++r) {
      rows_.codes[r] = w_.codes + (row + min64(r, rows - 1)) * w_.code_bytes;
    }
    rows_.ahead = w_.codes + (row + rows) * w_.code_bytes;
    rows_.end = rows_.ahead + later * w_.code_bytes;
    stats_ahead_ = w_.stats + (row + rows) * w_.stat_bytes;
    stats_end_ = stats_ahead_ + later * w_.stat_bytes;
    for (std::int64_t i = 0; i < job_.inputs * kRows; ++i) sums_[i] = 0.0F;
    for (std::int64_t c = 0; c < w_.cols; c += kStretch) {
      const std::int64_t n = min64(kStretch, w_.cols - c);
      const std::int64_t phase = slots_.template fill<kRows>(row, rows, c, n, a_, b_);
      for (std::int64_t k = 0; k < n; k += kIntPanelColumns) {
        add_panel(c + k, phase + k, min64(kIntPanelColumns, n - k), row, rows);
      }
    }
    if (direct_ != nullptr) store(0, job_.inputs, row, rows);
  }

 private:
  using F = typename V::F;
  using Multiply = void (*)(std::int64_t inputs, const IntPanel& p, const IntJob& job,
                            std::int64_t m, IntRows& rows, float* sums);
  static constexpr std::int64_t kSlots = kStretchSlots + 2 * kLanes;

  static Multiply tile(const KernelMatrix& w, const IntForm& form) {
    constexpr bool kTwo = V::kSigned;  // two products of bytes
    if (kTwo && form.wide(w.bits)) {
      return w.has_offsets ? multiply_inputs<V, kTwo, true, V::kInputs>
                           : multiply_inputs<V, kTwo, false, V::kInputs>;
    }
    return w.has_offsets ? multiply_inputs<V, false, true, V::kInputs>
                         : multiply_inputs<V, false, false, V::kInputs>;
  }

  /// Columns [col, col + n), which begin at `position` in the first slot. With the last ones a
  /// tile's outputs are stored at once: at powers of two apart, few of their lines stay in a cache.
  void add_panel(std::int64_t col, std::int64_t position, std::int64_t n, std::int64_t row,
                 std::int64_t rows) {
    const std::uint8_t* const ask_to = stats_ahead_ + kRows * w_.stat_bytes * n / w_.cols;
    for (; stats_ahead_ < ask_to && stats_ahead_ < stats_end_; stats_ahead_ += 64) {
      __builtin_prefetch(stats_ahead_, 0, 2);
    }
    const std::int64_t run = job_.form->run;
    IntPanel p;
    p.codes = panel_;
    p.col = col;
    p.first_run = col / run;
    p.runs = (n + run - 1) / run;
    p.words = run / 4;
    p.last_words = (n - (p.runs - 1) * run + 3) / 4;
    p.ask_lines = n * w_.bits * kRows / (2 * 8 * 64) / p.runs;
    for (std::int64_t r = 0; r < p.runs; ++r) {
      const std::int64_t at = (position + r * run) / w_.group_size * kRows;
      p.a[r] = a_ + at;
      p.b[r] = b_ + at;
    }
    if (direct_ != nullptr) return direct_(rows_, p, job_, sums_);
    fill_(*job_.form, rows_, col, n, panel_);
    const std::int64_t tile = job_.x.tile;
    const bool last = col + n == w_.cols;
    for (std::int64_t m = 0; m < job_.inputs; m += tile) {
      const std::int64_t count = min64(tile, job_.inputs - m);
      if (last) {
        for (std::int64_t i = 0; i < count; ++i) __builtin_prefetch(output(m + i, row), 1);
      }
      multiply_(count, p, job_, m, rows_, sums_ + m * kRows);
      if (last) store(m, count, row, rows);
    }
  }

  std::uint8_t* output(std::int64_t m, std::int64_t row) const {
    return static_cast<std::uint8_t*>(job_.y) + (m * job_.ldy + row) * float_bytes(job_.y_kind);
  }

  void store(std::int64_t m, std::int64_t count, std::int64_t row, std::int64_t rows) const {
    const std::int64_t bytes = float_bytes(job_.y_kind);
    for (const std::int64_t end = m + count; m < end; ++m) {
      for (std::int64_t r = 0; r < rows; r += kLanes) {
        const auto n = static_cast<int>(min64(kLanes, rows - r));
        typename T::F v = T::load_n(sums_ + m * kRows + r, n);
        if (job_.bias != nullptr) v = T::add(v, T::load_n(job_.bias + row + r, n));
        store_kind_n<T>(job_.y_kind, v, output(m, row) + r * bytes, n);
      }
    }
  }

  const KernelMatrix& w_;
  const IntJob& job_;
  const AddDirect direct_;
  const FillPanel fill_;
  const Multiply multiply_;
  const IntSlots<T, V> slots_;
  std::int32_t* const panel_;
  float* const a_;
  float* const b_;
  float* const sums_;
  IntRows rows_;
  const std::uint8_t* stats_ahead_;
  const std::uint8_t* stats_end_;
};

template <class T, class V>
void matmul_int(const KernelMatrix& w, const IntJob& job, std::int64_t row,
                std::int64_t row_end) noexcept {
  constexpr std::int64_t kRows = IntProduct<T, V>::kRows;
  static_assert(kIntRowUnit % kRows == 0);
  IntProduct<T, V> product(w, job);
  if (row < row_end) product.ask_for_first(row);
  for (; row < row_end; row += kRows) product.run(row, min64(kRows, row_end - row));
}

template <class T, class V>
constexpr IntKernels int_kernels() {
  return {quantize_int_tile<T>, matmul_int<T, V>, V::kSigned, V::kInputs};
}

}  // namespace
}  // namespace quantal

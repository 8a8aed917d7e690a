#include "quantal/low_rank.h"

#include <algorithm>
#include <string>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/low_rank_kernels.h"
#include "kernels/scratch.h"
#include "kernels/tasks.h"

namespace quantal {
namespace {

/// Products that are worth a task of their own; fewer in all run on the calling thread.
constexpr std::int64_t kTaskProducts = 64 * 1024;
/// Rows up to which B is multiplied as it lies; for more it is transposed.
constexpr std::int64_t kFewRows = 8;

void check(const LowRank& w, std::int64_t m_rows) {
  for (const std::int64_t size : {w.in, w.out, w.rank, m_rows}) {
    if (size < 0) {
      fail(Errc::kShape, "low_rank: a size is " + std::to_string(size) + ", expected >= 0");
    }
  }
}

/// One call: kernels, sizes and the calling thread's memory.
class Product {
 public:
  Product(const LowRank& w, DType dtype, std::int64_t m_rows, const Executor& executor)
      : w_(w),
        kind_(float_kind(dtype, "low_rank", "dtype")),
        bytes_(static_cast<std::int64_t>(dtype_size(dtype))),
        m_rows_(m_rows),
        kernels_(cpu_kernels().low_rank()),
        executor_(executor) {
    check(w, m_rows);
  }

  void add(const void* x, void* y, float* t) {
    if (m_rows_ <= kFewRows) return add_few(x, y, t);
    transpose_b(reserve(w_.rank * w_.out));
    each_rows(w_.in + w_.out, [&](std::int64_t m, std::int64_t rows) {
      kernels_.reduce(kind_, row(x, m, w_.in), rows, w_.in, w_.a, w_.rank, w_.scaling,
                      t + m * w_.rank);
      kernels_.expand(kind_, t + m * w_.rank, rows, w_.rank, b_, w_.out, row(y, m, w_.out));
    });
  }

  void differentiate(const void* grad, const void* x, const float* t, void* x_grad, float* a_grad,
                     float* b_grad) {
    float* memory = reserve(2 * w_.rank * w_.out + m_rows_ * w_.rank);
    float* const b_sums = memory + w_.rank * w_.out;
    float* const d = b_sums + w_.rank * w_.out;
    transpose_b(memory);
    each_rows(w_.out + (x_grad == nullptr ? 0 : w_.in), [&](std::int64_t m, std::int64_t rows) {
      kernels_.reduce(kind_, row(grad, m, w_.out), rows, w_.out, b_, w_.rank, w_.scaling,
                      d + m * w_.rank);
      if (x_grad != nullptr) {
        kernels_.expand(kind_, d + m * w_.rank, rows, w_.rank, w_.a, w_.in, row(x_grad, m, w_.in));
      }
    });
    each_columns(w_.in, m_rows_, [&](std::int64_t begin, std::int64_t end) {
      kernels_.outer(kind_, d, m_rows_, w_.rank, x, w_.in, begin, end, a_grad);
    });
    each_columns(w_.out, m_rows_, [&](std::int64_t begin, std::int64_t end) {
      kernels_.outer(kind_, t, m_rows_, w_.rank, grad, w_.out, begin, end, b_sums);
      for (std::int64_t n = begin; n < end; ++n) {
        for (std::int64_t r = 0; r < w_.rank; ++r) b_grad[n * w_.rank + r] = b_sums[r * w_.out + n];
      }
    });
  }

 private:
  static constexpr float kOne = 1.0F;

  /// The changes of all outputs row by row of B, then added.
  void add_few(const void* x, void* y, float* t) {
    float* changes = reserve(m_rows_ * w_.out);
    kernels_.reduce(kind_, x, m_rows_, w_.in, w_.a, w_.rank, w_.scaling, t);
    kernels_.reduce(FloatKind::kF32, t, m_rows_, w_.rank, w_.b, w_.out, 1.0F, changes);
    for (std::int64_t m = 0; m < m_rows_; ++m) {
      kernels_.expand(kind_, &kOne, 1, 1, changes + m * w_.out, w_.out, row(y, m, w_.out));
    }
  }

  float* reserve(std::int64_t floats) {
    return static_cast<float*>(thread_scratch<Scratch::kInputs>(
        checked_mul(std::max<std::int64_t>(floats, 1), 4, "low_rank: scratch")));
  }
  const void* row(const void* data, std::int64_t m, std::int64_t n) const {
    return static_cast<const std::uint8_t*>(data) + m * n * bytes_;
  }
  void* row(void* data, std::int64_t m, std::int64_t n) const {
    return static_cast<std::uint8_t*>(data) + m * n * bytes_;
  }

  template <class Body>
  void run(std::int64_t units, std::int64_t products, Body body) {
    run_tasks(executor_, units, ceil_div(kTaskProducts, std::max<std::int64_t>(products, 1)), body);
  }
  /// body(first row, rows) for blocks of rows with `width` products a row and rank.
  template <class Body>
  void each_rows(std::int64_t width, Body body) {
    constexpr std::int64_t kRows = LowRankKernels::kRows;
    run(ceil_div(m_rows_, kRows), kRows * w_.rank * width,
        [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t m = begin * kRows; m < std::min(end * kRows, m_rows_); m += kRows) {
            body(m, std::min(kRows, m_rows_ - m));
          }
        });
  }
  /// body(begin, end) for blocks of columns with `height` products a column and rank.
  template <class Body>
  void each_columns(std::int64_t columns, std::int64_t height, Body body) {
    constexpr std::int64_t kColumns = LowRankKernels::kColumns;
    run(ceil_div(columns, kColumns), kColumns * w_.rank * height,
        [&](std::int64_t begin, std::int64_t end) {
          body(begin * kColumns, std::min(end * kColumns, columns));
        });
  }

  /// B as the kernels take it: b_[r, n].
  void transpose_b(float* to) {
    b_ = to;
    each_columns(w_.out, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n) {
        for (std::int64_t r = 0; r < w_.rank; ++r) to[r * w_.out + n] = w_.b[n * w_.rank + r];
      }
    });
  }

  const LowRank& w_;
  const FloatKind kind_;
  const std::int64_t bytes_, m_rows_;
  const LowRankKernels& kernels_;
  const Executor& executor_;
  const float* b_ = nullptr;
};

}  // namespace

void add_low_rank(const LowRank& w, DType dtype, const void* x, std::int64_t m_rows, void* y,
                  float* t, const Executor& executor) {
  Product(w, dtype, m_rows, executor).add(x, y, t);
}

void low_rank_backward(const LowRank& w, DType dtype, const void* grad, const void* x,
                       const float* t, std::int64_t m_rows, void* x_grad, float* a_grad,
                       float* b_grad, const Executor& executor) {
  Product(w, dtype, m_rows, executor).differentiate(grad, x, t, x_grad, a_grad, b_grad);
}

}  // namespace quantal

// quantal low_rank: what LoRA adds to a product, and its gradients, without wide copies of the
// activations.
#pragma once

#include <cstdint>

#include "quantal/core.h"

namespace quantal {

/// `scaling * B A`, which is added to a weight [out, in]. Both matrices are float32, row-major and
/// contiguous.
struct LowRank {
  std::int64_t in = 0;       ///< columns of A
  std::int64_t out = 0;      ///< rows of B
  std::int64_t rank = 0;     ///< rows of A, columns of B
  const float* a = nullptr;  ///< A [rank, in]
  const float* b = nullptr;  ///< B [out, rank]
  float scaling = 1;         ///< usually alpha / rank
};

/// `y[m, n] += sum_r t[m, r] b[n, r]` with `t[m, r] = scaling * sum_k x[m, k] a[r, k]`. x [m_rows,
/// in] and y [m_rows, out] are row-major and contiguous, of `dtype` (kF32, kF16 or kBF16), and
/// widened to float32, in which everything is summed; y is rounded once. t, float32 [m_rows, rank],
/// is what the gradient needs. Bits depend on nothing but the shapes and the kernel set. Throws
/// Error{kDtype}, Error{kShape} for negative sizes.
void add_low_rank(const LowRank& w, DType dtype, const void* x, std::int64_t m_rows, void* y,
                  float* t, const Executor& executor);

/// Gradients of add_low_rank by x, A and B from `grad` [m_rows, out], that of y: with
/// `d[m, r] = scaling * sum_n grad[m, n] b[n, r]`, `x_grad[m, k] += sum_r d[m, r] a[r, k]`,
/// `a_grad[r, k] = sum_m d[m, r] x[m, k]`, `b_grad[n, r] = sum_m grad[m, n] t[m, r]`. x_grad, of
/// `dtype`, may be null. a_grad [rank, in] and b_grad [out, rank] are float32. Determinism and
/// errors as add_low_rank.
void low_rank_backward(const LowRank& w, DType dtype, const void* grad, const void* x,
                       const float* t, std::int64_t m_rows, void* x_grad, float* a_grad,
                       float* b_grad, const Executor& executor);

}  // namespace quantal

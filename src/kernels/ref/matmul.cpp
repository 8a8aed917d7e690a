#include <cmath>
#include <utility>

#include "core/half.h"
#include "kernels/ref/ref.h"

namespace quantal::ref {
namespace {

/// of(n, k): a weight and its size.
template <class Of>
void matmul_of(const PackedSpec& spec, Of of, const float* x, std::int64_t m_rows,
               const float* bias, double* y, double* magnitude) {
  const std::int64_t rows = spec.rows;
  const std::int64_t cols = spec.cols;
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t m = 0; m < m_rows; ++m) {
      y[m * rows + n] = bias != nullptr ? bias[n] : 0.0;
      magnitude[m * rows + n] = std::fabs(y[m * rows + n]);
    }
    for (std::int64_t k = 0; k < cols; ++k) {
      const auto [weight, size] = of(n, k);
      for (std::int64_t m = 0; m < m_rows; ++m) {
        y[m * rows + n] += weight * x[m * cols + k];
        magnitude[m * rows + n] += size * std::fabs(static_cast<double>(x[m * cols + k]));
      }
    }
  }
}

}  // namespace

void matmul(const PackedView& w, const float* x, std::int64_t m_rows, const float* bias, double* y,
            double* magnitude) {
  const auto of = [&](std::int64_t n, std::int64_t k) {
    const double v = value(w, n, k);
    return std::pair(v, std::fabs(v));
  };
  matmul_of(w.spec, of, x, m_rows, bias, y, magnitude);
}

void matmul_of_levels(const PackedView& w, const float* x, std::int64_t m_rows, const float* bias,
                      double* y, double* magnitude) {
  const auto of = [&](std::int64_t n, std::int64_t k) {
    const Parts p = parts(w, n, k);
    const double scaled = bf16_to_f32(f32_to_bf16(p.level)) * p.scale;
    return std::pair(scaled + p.offset, std::fabs(scaled) + std::fabs(p.offset));
  };
  matmul_of(w.spec, of, x, m_rows, bias, y, magnitude);
}

void matmul_transposed(const PackedView& w, const float* g, std::int64_t m_rows, double* y,
                       double* magnitude) {
  const std::int64_t rows = w.spec.rows;
  const std::int64_t cols = w.spec.cols;
  for (std::int64_t i = 0; i < m_rows * cols; ++i) y[i] = magnitude[i] = 0.0;
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t k = 0; k < cols; ++k) {
      const double v = value(w, n, k);
      for (std::int64_t m = 0; m < m_rows; ++m) {
        const double product = v * g[m * rows + n];
        y[m * cols + k] += product;
        magnitude[m * cols + k] += std::fabs(product);
      }
    }
  }
}

}  // namespace quantal::ref

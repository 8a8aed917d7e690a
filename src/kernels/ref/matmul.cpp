#include <cmath>

#include "kernels/ref/ref.h"

namespace quantal::ref {

void matmul(const PackedView& w, const float* x, std::int64_t m_rows, const float* bias, double* y,
            double* magnitude) {
  const std::int64_t rows = w.spec.rows;
  const std::int64_t cols = w.spec.cols;
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t m = 0; m < m_rows; ++m) {
      y[m * rows + n] = bias != nullptr ? bias[n] : 0.0;
      magnitude[m * rows + n] = std::fabs(y[m * rows + n]);
    }
    for (std::int64_t k = 0; k < cols; ++k) {
      const double v = value(w, n, k);
      for (std::int64_t m = 0; m < m_rows; ++m) {
        const double product = v * x[m * cols + k];
        y[m * rows + n] += product;
        magnitude[m * rows + n] += std::fabs(product);
      }
    }
  }
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

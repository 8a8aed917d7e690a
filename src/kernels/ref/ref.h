// Scalar truth: every kernel of every instruction set is tested against these. One element at a
// time, indexed like the formulas of quantal/kernels.h; sums in double.
#pragma once

#include <cstdint>

#include "quantal/kernels.h"

namespace quantal::ref {

/// w(row, col) exactly as defined at quantal::Offset. Checks nothing.
float value(const PackedView& w, std::int64_t row, std::int64_t col);

/// out[(r - row_begin) * ld + (c - col_begin)] = out_dtype(w(r, c)).
void dequantize(const PackedView& w, const Panel& panel, DType out_dtype, void* out,
                std::int64_t ld);

/// y[m, n] = sum_k x[m, k] * w(n, k) (+ bias[n]); magnitude[m, n] = sum_k |x[m, k]| |w(n, k)| (+
/// |bias|).
void matmul(const PackedView& w, const float* x, std::int64_t m_rows, const float* bias, double* y,
            double* magnitude);

/// What w(row, col) is made of before any rounding: level * scale + offset.
struct Parts {
  float level;
  double scale, offset;
};
Parts parts(const PackedView& w, std::int64_t row, std::int64_t col);

/// matmul with weights level * scale + offset, levels rounded to bfloat16 and nothing else;
/// magnitude[m, n] = sum_k |x[m, k]| (|level * scale| + |offset|) (+ |bias|).
void matmul_of_levels(const PackedView& w, const float* x, std::int64_t m_rows, const float* bias,
                      double* y, double* magnitude);

/// y[m, k] = sum_n g[m, n] * w(n, k); magnitude as in matmul.
void matmul_transposed(const PackedView& w, const float* g, std::int64_t m_rows, double* y,
                       double* magnitude);

}  // namespace quantal::ref

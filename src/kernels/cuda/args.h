// What kernels are given, by value.
#pragma once

#include "kernels/cuda/matrix.h"

namespace quantal::cuda {

/// out[r, c] = out_kind(w(row + r, col + c)), rows of `ld` elements.
struct DequantizeArgs {
  Matrix w;
  std::int64_t row, rows, col, cols;  ///< col is a multiple of 32 (kernels of pairs)
  FloatKind out_kind;
  void* out;
  std::int64_t ld;
  bool aligned;  ///< every row of out begins at 16 bytes
};

/// out[r] = sum over c of w(r, c)^2 in float64: lane l of a warp adds columns l, l + 32, ... in
/// order, then lanes are added as l += l + 16, 8, 4, 2, 1.
struct NormArgs {
  Matrix w;
  double* out;
};

/// y[m, n] = sum_k x[m, k] w(n, k) + bias[n]; x [inputs, cols] and y [inputs, rows] of one 16-bit
/// kind. Requires whole_chunks, 16-byte alignment of x.
struct SmallArgs {
  Matrix w;
  const std::uint16_t* x;
  int inputs;
  FloatKind bias_kind;
  const void* bias;  ///< null: none
  std::uint16_t* y;
};

/// Forward: y[m, n] = sum_k x[m, k] w(n, k) + bias[n], depth = cols, width = rows. Transposed:
/// y[m, k] = sum_n x[m, n] w(n, k), depth = rows, width = cols, no bias. Requires whole_chunks,
/// a depth that is a multiple of 8, 16-byte alignment of x and 4-byte alignment of y.
struct TileArgs {
  Matrix w;
  const std::uint16_t* x;
  std::int64_t inputs;
  FloatKind bias_kind;
  const void* bias;  ///< null: none
  std::uint16_t* y;
};

/// Scratch of one product, in the caller's workspace.
struct Int8Scratch {
  std::int8_t* q;          ///< [inputs, ld], zero beyond cols
  float* scale;            ///< [inputs]
  std::int32_t* sum;       ///< [inputs] of q
  std::uint8_t* marks;     ///< [cols], 1 where a column holds an outlier
  std::int32_t* outliers;  ///< number of outliers, then their columns, ascending
};
/// One product of LLM.int8.
struct Int8Args {
  Matrix w;
  FloatKind kind;  ///< of x and y
  const void* x;   ///< [inputs, cols]
  std::int64_t inputs;
  float threshold;  ///< 0: no outliers
  FloatKind bias_kind;
  const void* bias;  ///< null: none
  void* y;           ///< [inputs, rows]
  std::int64_t ld;   ///< of q: cols rounded up to 16
  Int8Scratch scratch;
};

}  // namespace quantal::cuda

// The integer part of LLM.int8 (quantal/kernels.h, matmul_int8) across the line between the
// dispatcher and the files of one instruction set. Only <cstdint> may be included here.
#pragma once

#include <cstdint>

namespace quantal {

/// Weight rows and activation rows of one tile of dot products.
inline constexpr int kInt8Rows = 4;
inline constexpr int kInt8Inputs = 4;
/// Most columns of one call: sums of 255 * 127 stay below 2^31.
inline constexpr std::int64_t kInt8Columns = 65536;

/// A tile: rows <= kInt8Rows of codes (bytes 0 .. 255) and inputs <= kInt8Inputs of activations
/// (-127 .. 127), cols <= kInt8Columns of each. Rows of both end on a multiple of 16 bytes,
/// activations there are 0.
struct Int8Tile {
  const std::uint8_t* codes;
  std::int64_t code_stride;
  int rows;
  const std::int8_t* x;
  std::int64_t x_stride;
  int inputs;
  std::int64_t cols;
};

/// What one instruction set brings. Integers are exact, so every set gives the same.
struct Int8Kernels {
  /// x[i] = f16(x[i]), n a multiple of 16; outliers |x[i]| >= threshold (> 0) set columns[i] to 1,
  /// other columns are left as they are.
  void (*round_and_mark)(float* x, std::int64_t n, float threshold, float* columns) noexcept;
  /// Rounded activations of a row to int8; returns the row's scale max |x| over all but outliers
  /// (NaN if one is not finite). q = rint(x * ((1 / scale) * 127)), NaN becomes 0; 0 where
  /// columns[i] is 1. threshold 0: no outliers.
  float (*quantize)(const float* x, std::int64_t n, float threshold, const float* columns,
                    std::int8_t* q) noexcept;
  /// sums[m * kInt8Rows + r] = sum over k of x[m, k] * codes[r, k].
  void (*dot)(const Int8Tile& tile, std::int32_t* sums) noexcept;
};

const Int8Kernels& int8_kernels_scalar();
const Int8Kernels& int8_kernels_avx2();
/// dot by VNNI where `vnni`, else by 16-bit products.
const Int8Kernels& int8_kernels_avx512(bool vnni);
const Int8Kernels& int8_kernels_neon();

}  // namespace quantal

// Rows of activations to int8 (int8_kernels.h) for any vector type T (vec_*.h), and the loop over
// tiles of dot products.
#pragma once

#include <cstdint>

#include "kernels/cpu/int8_kernels.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr int kInt8Lanes = 16;

template <class T>
void round_and_mark(float* x, std::int64_t n, float threshold, float* columns) noexcept {
  const typename T::F limit = T::set1(threshold);
  for (std::int64_t i = 0; i < n; i += kInt8Lanes) {
    const typename T::F v = T::round_f16(T::load(x + i));
    T::store(x + i, v);
    if (threshold > 0.0F) {
      const auto outlier = T::le(limit, T::abs(v));
      if (T::any(outlier)) {
        T::store(columns + i, T::select(outlier, T::set1(1.0F), T::load(columns + i)));
      }
    }
  }
}

template <class T>
float quantize_activations(const float* x, std::int64_t n, float threshold, const float* columns,
                           std::int8_t* q) noexcept {
  using F = typename T::F;
  const F limit = T::set1(threshold > 0.0F ? threshold : __builtin_inff());
  const F zero = T::zero();
  // Without a threshold infinities are no outliers.
  const auto inlier = [&](F v) {
    return threshold > 0.0F ? T::select(T::le(limit, T::abs(v)), zero, v) : v;
  };
  F most = zero;
  F poison = zero;  // 0, or NaN after an infinity or a NaN
  for (std::int64_t i = 0; i < n; i += kInt8Lanes) {
    const F v = inlier(T::load(x + i));
    most = T::max(T::abs(v), most);
    poison = T::add(poison, T::mul(v, zero));
  }
  const float scale = T::reduce_max(most) + T::sum(poison);
  const float inverse = 1.0F / scale;
  const F factor = T::set1(inverse * 127.0F);
  for (std::int64_t i = 0; i < n; i += kInt8Lanes) {
    const F r = T::rint(T::mul(inlier(T::load(x + i)), factor));
    const F number = T::select(T::eq(r, r), r, zero);
    const F kept = T::select(T::eq(T::load(columns + i), zero), number, zero);
    T::store_u8(reinterpret_cast<std::uint8_t*>(q + i), T::to_i(kept));
  }
  return scale;
}

/// Dot is a template with run<kRows, kInputs>(tile, first row, first input, sums).
template <class Dot>
void dot_tile(const Int8Tile& tile, std::int32_t* sums) noexcept {
  if (tile.rows == kInt8Rows && tile.inputs == kInt8Inputs) {
    return Dot::template run<kInt8Rows, kInt8Inputs>(tile, 0, 0, sums);
  }
  for (int m = 0; m < tile.inputs; ++m) {
    if (tile.rows == kInt8Rows) {
      Dot::template run<kInt8Rows, 1>(tile, 0, m, sums);
    } else {
      for (int r = 0; r < tile.rows; ++r) Dot::template run<1, 1>(tile, r, m, sums);
    }
  }
}

}  // namespace
}  // namespace quantal

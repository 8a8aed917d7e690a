// a^y for the solvers, one number at a time, for host and device.
//
// Internal linkage on purpose: files compiled for one instruction set include this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/host_device.h"
#include "kernels/quantize_power.h"

namespace quantal {
namespace {  // NOLINT: see above

// A device takes elements of a constant array only as constants of their own.
template <std::size_t kIndex>
constexpr double kLog2Term = kLog2Poly[kIndex];
template <std::size_t kIndex>
constexpr double kExp2Term = kExp2Poly[kIndex];
constexpr std::size_t kLog2Last = kLog2Poly.size() - 1, kExp2Last = kExp2Poly.size() - 1;

/// Horner's rule from coefficient kIndex on.
template <std::size_t kIndex>
[[maybe_unused]] QUANTAL_HD double log2_polynomial(double t) {
  if constexpr (kIndex == kLog2Last) {
    return kLog2Term<kIndex>;
  } else {
    return log2_polynomial<kIndex + 1>(t) * t + kLog2Term<kIndex>;
  }
}
template <std::size_t kIndex>
[[maybe_unused]] QUANTAL_HD double exp2_polynomial(double f) {
  if constexpr (kIndex == kExp2Last) {
    return kExp2Term<kIndex>;
  } else {
    return exp2_polynomial<kIndex + 1>(f) * f + kExp2Term<kIndex>;
  }
}

/// a^y in float32 for finite a > 0 and |y| < 4, within 0.51 ulp (see quantize_power.h); infinity
/// for a = 0 (y < 0).
[[maybe_unused]] QUANTAL_HD float power_of_one(float a, float y) {
  if (a == 0.0F) return __builtin_bit_cast(float, 0x7F800000u);
  const auto bits = __builtin_bit_cast(std::int64_t, static_cast<double>(a));
  const std::int64_t exponent = (bits - kSqrtHalfBits) >> 52;
  const double t = __builtin_bit_cast(double, bits - exponent * (std::int64_t{1} << 52)) - 1.0;
  const double log2 = log2_polynomial<0>(t) * t + static_cast<double>(exponent);
  constexpr double kRound = 0x1.8p52;  // the sum holds the nearest integer in its low bits
  const double scaled = static_cast<double>(y) * log2;
  const double shifted = scaled + kRound;
  const double exp2 = exp2_polynomial<0>(scaled - (shifted - kRound));
  const std::uint64_t whole = __builtin_bit_cast(std::uint64_t, shifted) + 1023U;
  return static_cast<float>(exp2 * __builtin_bit_cast(double, whole << 52));
}

}  // namespace
}  // namespace quantal

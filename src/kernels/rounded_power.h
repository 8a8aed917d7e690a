// a^y for the solver of kernels/rounded.h, one number at a time (it is needed for few weights).
//
// Internal linkage on purpose: files compiled for one instruction set include this.
#pragma once

#include <bit>
#include <limits>

#include "kernels/quantize_power.h"

namespace quantal {
namespace {  // NOLINT: see above

/// a^y in float32 for finite a > 0 and |y| < 4, within 0.51 ulp (see quantize_power.h); infinity
/// for a = 0 (y < 0).
[[maybe_unused]] inline float power_of_one(float a, float y) {
  if (a == 0.0F) return std::numeric_limits<float>::infinity();
  const auto bits = std::bit_cast<std::int64_t>(static_cast<double>(a));
  const std::int64_t exponent = (bits - kSqrtHalfBits) >> 52;
  const double t = std::bit_cast<double>(bits - (exponent << 52)) - 1.0;
  double log2 = kLog2Poly.back();
  for (std::size_t i = kLog2Poly.size() - 1; i-- > 0;) log2 = log2 * t + kLog2Poly[i];
  log2 = log2 * t + static_cast<double>(exponent);
  constexpr double kRound = 0x1.8p52;  // the sum holds the nearest integer in its low bits
  const double scaled = static_cast<double>(y) * log2;
  const double shifted = scaled + kRound;
  const double f = scaled - (shifted - kRound);
  double exp2 = kExp2Poly.back();
  for (std::size_t i = kExp2Poly.size() - 1; i-- > 0;) exp2 = exp2 * f + kExp2Poly[i];
  const std::int64_t whole = std::bit_cast<std::int64_t>(shifted) << 52;
  return static_cast<float>(exp2 * std::bit_cast<double>(whole + (std::int64_t{1023} << 52)));
}

}  // namespace
}  // namespace quantal

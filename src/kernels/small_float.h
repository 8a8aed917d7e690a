// Scalar arithmetic of the one-byte float formats and of exponents, for host and device.
//
// Internal linkage on purpose: files compiled for one instruction set include this, and the linker
// must never keep such a copy for older CPUs.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "kernels/host_device.h"
#include "quantal/core.h"

namespace quantal {
namespace {  // NOLINT: see above

constexpr float kTinyScale = 1e-7F;  ///< least magnitude of a scale of anchored codes
constexpr float kE2M1Max = 6.0F;
constexpr float kE4M3Max = 448.0F;

/// The float nearest to v in a weight type, widened again; for the host.
[[maybe_unused]] inline float rounded_to(DType dtype, float v) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(v));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(v));
  return v;
}

/// Code of the E4M3 number nearest to v, half to even; magnitudes above 448 become 448.
[[maybe_unused]] QUANTAL_HD std::uint8_t e4m3_from_f32(float v) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, v);
  const auto sign = static_cast<std::uint8_t>((bits >> 24) & 0x80u);
  const float magnitude = __builtin_bit_cast(float, bits & 0x7FFFFFFFu);
  if (!(magnitude < kE4M3Max)) return static_cast<std::uint8_t>(sign | 0x7Eu);
  if (magnitude < 0x1p-6F) {
    // Multiples of 2^-9: adding 2^14 aligns them with the end of the mantissa and rounds.
    const std::uint32_t shifted = __builtin_bit_cast(std::uint32_t, magnitude + 0x1p14F);
    return static_cast<std::uint8_t>(sign | (shifted & 0xFu));
  }
  const std::uint32_t a = __builtin_bit_cast(std::uint32_t, magnitude);
  const std::uint32_t rounded = a + 0x7FFFFu + ((a >> 20) & 1u);             // drops 20 of 23 bits
  return static_cast<std::uint8_t>(sign | ((rounded >> 20) - (120u << 3)));  // 120 = 127 - 7
}

/// Value of a finite E4M3 code without its sign.
[[maybe_unused]] QUANTAL_HD float e4m3_magnitude(std::uint8_t code) {
  const std::uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-9F;
  return __builtin_bit_cast(float, ((exponent + 120u) << 23) | (mantissa << 20));
}

/// ceil(log2(x)) for finite x > 0, exact.
[[maybe_unused]] QUANTAL_HD int ceil_log2(float x) {
  int subnormal = 0;
  if (x < 0x1p-126F) {
    x *= 0x1p24F;
    subnormal = 24;
  }
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  return static_cast<int>(bits >> 23) - 127 - subnormal + ((bits & 0x7FFFFFu) != 0 ? 1 : 0);
}

/// 2^e for -149 <= e <= 127.
[[maybe_unused]] QUANTAL_HD float power_of_two(int e) {
  if (e >= -126) return __builtin_bit_cast(float, static_cast<std::uint32_t>(e + 127) << 23);
  return __builtin_bit_cast(float, std::uint32_t{1} << (e + 149));
}

/// Code of the E2M1 value nearest to v, distances in float32; of equally near ones the lowest code,
/// so 0 for NaN, infinities and everything so large that all distances round to the same. A value
/// of the other sign is never nearer than 0, so magnitudes are compared.
[[maybe_unused]] QUANTAL_HD std::uint8_t nearest_e2m1(float v) {
  constexpr float kMagnitudes[8] = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
  const float magnitude = v < 0 ? -v : v;
  float best = __builtin_bit_cast(float, 0x7F800000u);
  std::uint8_t code = 0;
  QUANTAL_UNROLL
  for (unsigned c = 0; c < 8; ++c) {
    const float difference = magnitude - kMagnitudes[c];
    const float distance = difference < 0 ? -difference : difference;
    if (distance < best) {
      best = distance;
      code = static_cast<std::uint8_t>(c);
    }
  }
  return static_cast<std::uint8_t>(v < 0 && code != 0 ? code + 8 : code);
}

}  // namespace
}  // namespace quantal

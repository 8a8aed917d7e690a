// Conversions between float32, the two 16-bit floats and the two 8-bit ones, for host and device.
// Roundings are half to even; the bits of a NaN are not part of any promise.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/device.h"

#if !defined(__CUDA_ARCH__)
#include "core/half.h"
#endif

namespace quantal::cuda {

QUANTAL_HD float float_of_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}
QUANTAL_HD std::uint32_t bits_of_float(float v) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(v);
#else
  return std::bit_cast<std::uint32_t>(v);
#endif
}

QUANTAL_HD double double_infinity() {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(0x7FF0000000000000LL);
#else
  return std::bit_cast<double>(std::int64_t{0x7FF0000000000000});
#endif
}

/// Nearest integer, half to even.
QUANTAL_HD float rounded(float v) {
#if defined(__CUDA_ARCH__)
  return rintf(v);
#else
  return __builtin_nearbyintf(v);
#endif
}
/// Nearest integer, halves away from zero.
QUANTAL_HD float rounded_away(float v) {
#if defined(__CUDA_ARCH__)
  return roundf(v);
#else
  return __builtin_roundf(v);
#endif
}
/// The integer towards zero.
QUANTAL_HD float truncated(float v) {
#if defined(__CUDA_ARCH__)
  return truncf(v);
#else
  return __builtin_truncf(v);
#endif
}
QUANTAL_HD float magnitude(float v) { return float_of_bits(bits_of_float(v) & 0x7FFFFFFFU); }
QUANTAL_HD bool is_finite(float v) { return (bits_of_float(v) & 0x7FFFFFFFU) < 0x7F800000U; }

// ------------------------------------------------------------------ 16 bits

QUANTAL_HD std::uint16_t f16_of(float v) {
#if defined(__CUDA_ARCH__)
  std::uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#else
  return f32_to_f16(v);
#endif
}
QUANTAL_HD std::uint16_t bf16_of(float v) {
#if defined(__CUDA_ARCH__)
  std::uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#else
  return f32_to_bf16(v);
#endif
}
QUANTAL_HD float of_f16(std::uint16_t h) {
#if defined(__CUDA_ARCH__)
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
  return v;
#else
  return f16_to_f32(h);
#endif
}
QUANTAL_HD float of_bf16(std::uint16_t h) {
  return float_of_bits(static_cast<std::uint32_t>(h) << 16);
}

/// A 16-bit element of kKind (kF16 or kBF16).
template <FloatKind kKind>
QUANTAL_HD std::uint16_t half_of(float v) {
  return kKind == FloatKind::kF16 ? f16_of(v) : bf16_of(v);
}
template <FloatKind kKind>
QUANTAL_HD float of_half(std::uint16_t h) {
  return kKind == FloatKind::kF16 ? of_f16(h) : of_bf16(h);
}

/// Two elements in one register, `low` in its low half.
template <FloatKind kKind>
QUANTAL_HD std::uint32_t pair_of(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t pair;
  if constexpr (kKind == FloatKind::kF16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return half_of<kKind>(low) | static_cast<std::uint32_t>(half_of<kKind>(high)) << 16;
#endif
}

/// An element in both halves of a register.
QUANTAL_HD constexpr std::uint32_t twice(std::uint32_t element) { return element | element << 16; }

/// a b + c of the low halves and of the high ones, each rounded once: one instruction. For hosts
/// one factor has to be 1 or `c` -0: the product is exact in float32, and float32 carries enough
/// digits that rounding its sum again gives what rounding once does (24 >= 2 * 11 + 2: Figueroa,
/// "When is double rounding innocuous?", 1995).
template <FloatKind kKind>
QUANTAL_HD std::uint32_t pair_fma(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(__CUDA_ARCH__)
  std::uint32_t d;
  if constexpr (kKind == FloatKind::kF16) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
#else
  const auto one = [&](unsigned shift) -> std::uint32_t {
    const auto value = [&](std::uint32_t v) {
      return of_half<kKind>(static_cast<std::uint16_t>(v >> shift));
    };
    return half_of<kKind>(value(a) * value(b) + value(c));
  };
  return one(0) | one(16) << 16;
#endif
}

/// r() of quantal::Offset.
template <FloatKind kKind>
QUANTAL_HD float round_to(float v) {
  if constexpr (kKind == FloatKind::kF32) return v;
  if constexpr (kKind == FloatKind::kF16) return of_f16(f16_of(v));
  if constexpr (kKind == FloatKind::kBF16) return of_bf16(bf16_of(v));
}
QUANTAL_HD float round_to(FloatKind kind, float v) {
  if (kind == FloatKind::kF16) return round_to<FloatKind::kF16>(v);
  if (kind == FloatKind::kBF16) return round_to<FloatKind::kBF16>(v);
  return v;
}

/// Element i of an array of `kind`.
QUANTAL_HD float load_float(FloatKind kind, const void* p, std::int64_t i) {
  if (kind == FloatKind::kF32) return static_cast<const float*>(p)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(p)[i];
  return kind == FloatKind::kF16 ? of_f16(h) : of_bf16(h);
}
QUANTAL_HD void store_float(FloatKind kind, void* p, std::int64_t i, float v) {
  if (kind == FloatKind::kF32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<std::uint16_t*>(p)[i] = kind == FloatKind::kF16 ? f16_of(v) : bf16_of(v);
  }
}

// ------------------------------------------------------------------ 8 bits

/// Value of an E4M3 code. Adding 120 to the exponent field rebiases it; exponent 0 has no hidden
/// one, which an exact subtraction takes off again.
QUANTAL_HD float of_e4m3(std::uint32_t code) {
  const std::uint32_t sign = (code & 0x80U) << 24, field = (code & 0x7FU) << 20;
  float v = float_of_bits(field + (120U << 23));
  if (v < 0x1p-6F) v = float_of_bits(field + (121U << 23)) - 0x1p-6F;
  if (field == 0x7FU << 20) v = float_of_bits(0x7FC00000U);
  return float_of_bits(bits_of_float(v) | sign);
}

/// Value of an E5M2 code, the same way; the largest exponent becomes float32's.
QUANTAL_HD float of_e5m2(std::uint32_t code) {
  const std::uint32_t sign = (code & 0x80U) << 24, field = (code & 0x7FU) << 21;
  float v = float_of_bits(field + (112U << 23));
  if (v < 0x1p-14F) v = float_of_bits(field + (113U << 23)) - 0x1p-14F;
  if (field >= 0x7CU << 21) v = float_of_bits((field + (112U << 23)) | 0x7F800000U);
  return float_of_bits(bits_of_float(v) | sign);
}

/// 2^(code - 127); code 0 is a subnormal of float32, 255 infinity (as std::ldexp gives).
QUANTAL_HD float of_e8m0(std::uint32_t code) {
  return float_of_bits(code == 0 ? 0x00400000U : code << 23);
}

}  // namespace quantal::cuda

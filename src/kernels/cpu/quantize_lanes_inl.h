// Vectors of QUANTAL_LANES float32 (4, 8 or 16) for the quantizer primitives: loads that widen, the
// float64 half, the power of the solver. Sixteen virtual lanes are kParts registers.
//
// Written with the compiler's generic vectors: every operation is an IEEE operation on its lanes,
// so results do not depend on the width, and nothing is contracted (-ffp-contract=off). Everything
// has internal linkage because each including file is compiled for another instruction set.
#pragma once

#include <cstring>
#include <limits>

#include "core/half.h"
#include "kernels/quantize.h"
#include "kernels/quantize_power.h"

#if QUANTAL_LANES == 16
#define QUANTAL_LOW_HALF 0, 1, 2, 3, 4, 5, 6, 7
#define QUANTAL_HIGH_HALF 8, 9, 10, 11, 12, 13, 14, 15
#elif QUANTAL_LANES == 8
#define QUANTAL_LOW_HALF 0, 1, 2, 3
#define QUANTAL_HIGH_HALF 4, 5, 6, 7
#elif QUANTAL_LANES == 4
#define QUANTAL_LOW_HALF 0, 1
#define QUANTAL_HIGH_HALF 2, 3
#else
#error "define QUANTAL_LANES as 4, 8 or 16 before including this file"
#endif

namespace quantal {
namespace {

constexpr int kWidth = QUANTAL_LANES;
constexpr int kVirtual = 16;
constexpr int kParts = kVirtual / kWidth;

using F = float __attribute__((vector_size(kWidth * 4)));
using I = std::int32_t __attribute__((vector_size(kWidth * 4)));
using H = std::uint16_t __attribute__((vector_size(kWidth * 2)));
using D = double __attribute__((vector_size(kWidth * 4)));
using L = std::int64_t __attribute__((vector_size(kWidth * 4)));
using HalfF = float __attribute__((vector_size(kWidth * 2)));

// Subtracting zero keeps the sign of -0; the compiler makes it a plain broadcast.
[[maybe_unused]] inline F all(float x) { return x - F{}; }
[[maybe_unused]] inline D all(double x) { return x - D{}; }
[[maybe_unused]] inline I all(std::int32_t x) { return x - I{}; }
[[maybe_unused]] inline L all(std::int64_t x) { return x - L{}; }

inline D low_half(F x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, QUANTAL_LOW_HALF), D);
}
inline D high_half(F x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, QUANTAL_HIGH_HALF), D);
}
inline F join(D low, D high) {
  return __builtin_shufflevector(__builtin_convertvector(low, HalfF),
                                 __builtin_convertvector(high, HalfF), QUANTAL_LOW_HALF,
                                 QUANTAL_HIGH_HALF);
}

inline F abs_of(F x) { return (F)((I)x & all(std::int32_t{0x7FFFFFFF})); }
inline I magnitude(F x) { return (I)x & all(std::int32_t{0x7FFFFFFF}); }

// ------------------------------------------------------------------ loads

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

/// Reads element i of a run of one dtype, alone or kWidth of them. Binary16 is widened by moving
/// the fields and multiplying by 2^112, exact for normal and subnormal numbers.
template <DType kType>
struct Reader;

template <>
struct Reader<DType::kF32> {
  const float* data;
  explicit Reader(const void* p) : data(static_cast<const float*>(p)) {}
  F vec(std::int64_t i) const { return load_as<F>(data + i); }
  float one(std::int64_t i) const { return data[i]; }
};

template <>
struct Reader<DType::kBF16> {
  const std::uint16_t* data;
  explicit Reader(const void* p) : data(static_cast<const std::uint16_t*>(p)) {}
  F vec(std::int64_t i) const {
    return (F)(__builtin_convertvector(load_as<H>(data + i), I) << 16);
  }
  float one(std::int64_t i) const { return bf16_to_f32(data[i]); }
};

template <>
struct Reader<DType::kF16> {
  const std::uint16_t* data;
  explicit Reader(const void* p) : data(static_cast<const std::uint16_t*>(p)) {}
  F vec(std::int64_t i) const {
    const I h = __builtin_convertvector(load_as<H>(data + i), I);
    const I fields = (h & 0x7FFF) << 13;
    const I finite = (I)((F)fields * 0x1p112F);
    const I special = fields | 0x7F800000;
    const I value = (h & 0x7C00) == 0x7C00 ? special : finite;
    return (F)(value | ((h & 0x8000) << 16));
  }
  float one(std::int64_t i) const { return f16_to_f32(data[i]); }
};

/// Calls body(Reader) with the reader of the run's dtype.
template <class Body>
inline auto with_reader(WeightRun w, Body body) {
  switch (w.dtype) {
    case DType::kF16:
      return body(Reader<DType::kF16>(w.data));
    case DType::kBF16:
      return body(Reader<DType::kBF16>(w.data));
    default:
      return body(Reader<DType::kF32>(w.data));
  }
}

/// Elements [i, i + valid) of a run and `fill` in the other virtual lanes.
template <DType kType>
inline void read_tail(const Reader<kType>& in, std::int64_t i, std::int64_t valid, float fill,
                      float* out) {
  for (int l = 0; l < kVirtual; ++l) out[l] = l < valid ? in.one(i + l) : fill;
}

// ------------------------------------------------------------------ a^-0.3

/// y = -0.3f * log2(a), see quantize_power.h. The exponent is found without a signed 64-bit shift,
/// which AVX2 lacks, and made a double by placing it in the low mantissa bits of 2^52.
inline D power_exponent(D a) {
  constexpr std::int64_t kBias = 1100;  // makes every exponent of a float32 positive
  constexpr std::int64_t kTwo52 = 0x4330000000000000;
  const L bits = (L)a;
  const L k = ((bits - kSqrtHalfBits) + (kBias << 52)) >> 52;
  const D t = (D)(bits - ((k - kBias) << 52)) - 1.0;
  D log2 = all(kLog2Poly.back());
  for (std::size_t i = kLog2Poly.size() - 1; i-- > 0;) log2 = log2 * t + kLog2Poly[i];
  const D whole = (D)(k + kTwo52) - (0x1p52 + static_cast<double>(kBias));
  log2 = log2 * t + whole;
  return static_cast<double>(kSolverPower) * log2;
}

/// 2^y for |y| < 1000. Adding 1.5 * 2^52 rounds to an integer in the low mantissa bits.
inline D exp2_of(D y) {
  constexpr double kRound = 0x1.8p52;
  const D shifted = y + kRound;
  const D f = y - (shifted - kRound);
  D exp2 = all(kExp2Poly.back());
  for (std::size_t i = kExp2Poly.size() - 1; i-- > 0;) exp2 = exp2 * f + kExp2Poly[i];
  return exp2 * (D)(((L)shifted + 1023) << 52);
}

inline F power_of(F a) {
  return join(exp2_of(power_exponent(low_half(a))), exp2_of(power_exponent(high_half(a))));
}

}  // namespace
}  // namespace quantal

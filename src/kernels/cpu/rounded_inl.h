// The rounded quantizer primitives for one vector width; see kernels/rounded.h for what each one
// does. A file compiled for one instruction set defines QUANTAL_LANES and QUANTAL_ROUNDED_SET, and
// includes this once.
#pragma once

#include "kernels/cpu/quantize_lanes_inl.h"
#include "kernels/rounded.h"
#include "kernels/rounded_power.h"

namespace quantal {
namespace {

using Bytes = std::uint8_t __attribute__((vector_size(kWidth)));

// ------------------------------------------------------------------ rounding

/// The nearest number of a dtype, half to even, as float32.
template <DType kType>
inline F rounded(F x);

template <>
inline F rounded<DType::kF32>(F x) {
  return x;
}

/// Carries into bit 16 and clears what is below; infinity and the default NaN stay what they are.
template <>
inline F rounded<DType::kBF16>(F x) {
  const I bits = (I)x;
  return (F)((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF);
}

/// Normal numbers: carries into bit 13. Below 2^-14 the sum with 0.5 has the spacing of subnormal
/// binary16 (2^-24), so the addition itself rounds. From 65520 on: infinity, NaN kept.
template <>
inline F rounded<DType::kF16>(F x) {
  const I bits = (I)x;
  const I m = magnitude(x);
  const I normal = (m + 0xFFF + ((m >> 13) & 1)) & ~0x1FFF;
  const I small = (I)(((F)m + 0.5F) - 0.5F);
  I value = m < 0x38800000 ? small : normal;
  value = m >= 0x477FF000 ? all(std::int32_t{0x7F800000}) : value;
  value = m > 0x7F800000 ? m : value;
  return (F)(value | (bits ^ m));
}

template <DType kType>
inline F round_as(const Reader<kType>&, F x) {
  return rounded<kType>(x);
}

// ------------------------------------------------------------------ codes

/// Parameters of kWidth neighbouring elements.
struct LaneCodes {
  F scale, shift, low, high, not_a_number;
};

inline LaneCodes lanes_of(const RoundedCode& c) {
  return {all(c.scale), all(c.shift), all(-c.zero), all(c.max_code - c.zero), all(c.not_a_number)};
}

inline F load_some(const float* from, std::int64_t valid, float fill) {
  alignas(64) float lanes[kWidth];
  for (std::int64_t l = 0; l < kWidth; ++l) lanes[l] = l < valid ? from[l] : fill;
  return load_as<F>(lanes);
}

inline LaneCodes lanes_at(const RoundedCodes& c, std::int64_t i, std::int64_t valid) {
  const bool full = valid >= kWidth;
  const F zero = full ? load_as<F>(c.zero + i) : load_some(c.zero + i, valid, 0.0F);
  return {full ? load_as<F>(c.scale + i) : load_some(c.scale + i, valid, 1.0F),
          full ? load_as<F>(c.shift + i) : load_some(c.shift + i, valid, 0.0F), F{} - zero,
          c.max_code - zero, all(c.not_a_number)};
}

constexpr float kRoundInteger = 0x1.8p23F;  // the sum holds the nearest integer in its low bits

/// Code of each lane minus `zero`, as float32.
template <class In>
inline F centred_code(const In& in, F w, const LaneCodes& c) {
  F x = round_as(in, round_as(in, w + c.shift) / c.scale);
  x = x == x ? x : c.not_a_number;
  x = x > c.low ? x : c.low;
  x = x < c.high ? x : c.high;
  return (x + kRoundInteger) - kRoundInteger;
}

template <class In>
inline Bytes code_bytes(const In& in, F w, const LaneCodes& c) {
  const F code = centred_code(in, w, c) - c.low;
  return __builtin_convertvector((I)(code + kRoundInteger) & 0xFF, Bytes);
}

/// `valid` elements from `i` on, 0 in the other lanes.
template <class In>
inline F read_some(const In& in, std::int64_t i, std::int64_t valid) {
  alignas(64) float lanes[kWidth];
  for (std::int64_t l = 0; l < kWidth; ++l) lanes[l] = l < valid ? in.one(i + l) : 0.0F;
  return load_as<F>(lanes);
}

/// `lanes(i, valid)` gives the parameters of the lanes from element i on.
template <class In, class Lanes>
inline void encode_run(const In& in, std::int64_t n, const Lanes& lanes, std::uint8_t* codes) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Bytes bytes = code_bytes(in, in.vec(i), lanes(i, std::int64_t{kWidth}));
    std::memcpy(codes + i, &bytes, sizeof(bytes));
  }
  if (i == n) return;
  const Bytes bytes = code_bytes(in, read_some(in, i, n - i), lanes(i, n - i));
  std::memcpy(codes + i, &bytes, static_cast<std::size_t>(n - i));
}

void encode(WeightRun w, std::int64_t n, const RoundedCode& code, std::uint8_t* codes) {
  const LaneCodes c = lanes_of(code);
  with_reader(w, [&](const auto& in) {
    encode_run(
        in, n, [&](std::int64_t, std::int64_t) { return c; }, codes);
  });
}

void encode_each(WeightRun w, std::int64_t n, const RoundedCodes& code, std::uint8_t* codes) {
  with_reader(w, [&](const auto& in) {
    encode_run(
        in, n, [&](std::int64_t i, std::int64_t valid) { return lanes_at(code, i, valid); }, codes);
  });
}

// ------------------------------------------------------------------ ranges

bool range_each(WeightRun w, std::int64_t n, float* low, float* high) {
  return with_reader(w, [&](const auto& in) {
    I most = {};
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const F x = in.vec(i), lo = load_as<F>(low + i), hi = load_as<F>(high + i);
      const I m = magnitude(x);
      const F less = x < lo ? x : lo, more = x > hi ? x : hi;
      most = m > most ? m : most;
      std::memcpy(low + i, &less, sizeof(less));
      std::memcpy(high + i, &more, sizeof(more));
    }
    std::int32_t lanes[kWidth];
    std::memcpy(lanes, &most, sizeof(lanes));
    bool finite = true;
    for (const std::int32_t l : lanes) finite = finite && l < 0x7F800000;
    for (; i < n; ++i) {
      const float x = in.one(i);
      finite = finite && x - x == 0.0F;
      low[i] = x < low[i] ? x : low[i];
      high[i] = x > high[i] ? x : high[i];
    }
    return finite;
  });
}

// ------------------------------------------------------------------ solver

inline bool any_above(F x, float bound) {
  const I above = x > bound;
  std::int32_t lanes[kWidth];
  std::memcpy(lanes, &above, sizeof(lanes));
  std::int32_t any = 0;
  for (const std::int32_t l : lanes) any |= l;
  return any != 0;
}

/// The shrunken residual of each lane; lanes up to no_shrink give 0.
template <class In>
inline F shrunken(const In& in, F d, F a, const Shrink& s) {
  alignas(64) float lanes[kWidth];
  std::memcpy(lanes, &a, sizeof(lanes));
  for (float& l : lanes) l = l > s.no_shrink ? power_of_one(l, s.power) : 0.0F;
  const F bound = round_as(in, all(s.inverse_beta) * round_as(in, load_as<F>(lanes)));
  const F left = round_as(in, a - bound);
  F e = left > 0.0F ? left : F{};
  e = a > s.no_shrink ? e : F{};
  return (F)((I)e | ((I)d & all(std::int32_t{-0x7FFFFFFF - 1})));
}

/// The two summands of each lane.
struct LaneTerms {
  F zero, error;
};

template <class In>
inline LaneTerms terms_of(const In& in, F w, const LaneCodes& c, const Shrink& s) {
  const F p = round_as(in, c.scale * centred_code(in, w, c));
  const F d = round_as(in, w - round_as(in, p - c.shift));
  const F a = abs_of(d);
  const F e = any_above(a, s.no_shrink) ? shrunken(in, d, a, s) : F{};
  return {round_as(in, p - round_as(in, w - e)), a};
}

/// Adds `x` to kWidth sums.
inline void add_wide(F x, D* sums) {
  sums[0] += low_half(x);
  sums[1] += high_half(x);
}

inline double fold(const D* sums) {
  alignas(64) double d[kVirtual];
  std::memcpy(d, sums, sizeof(d));
  for (int half = kVirtual / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) d[l] += d[l + half];
  }
  return d[0];
}

template <class In>
inline SolverSums step_run(const In& in, std::int64_t n, const LaneCodes& c, const Shrink& s) {
  D zero[2 * kParts] = {}, error[2 * kParts] = {};
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const std::int64_t part = 2 * (i / kWidth % kParts), valid = n - i;
    LaneTerms t = terms_of(in, valid >= kWidth ? in.vec(i) : read_some(in, i, valid), c, s);
    if (valid < kWidth) {
      t.zero = load_some(reinterpret_cast<const float*>(&t.zero), valid, 0.0F);
      t.error = load_some(reinterpret_cast<const float*>(&t.error), valid, 0.0F);
    }
    add_wide(t.zero, zero + part);
    add_wide(t.error, error + part);
  }
  return {fold(zero), fold(error)};
}

SolverSums shrink_step(WeightRun w, std::int64_t n, const RoundedCode& code, const Shrink& shrink) {
  const LaneCodes c = lanes_of(code);
  return with_reader(w, [&](const auto& in) { return step_run(in, n, c, shrink); });
}

void shrink_step_each(WeightRun w, std::int64_t n, const RoundedCodes& code, const Shrink& shrink,
                      double* zero, double* error) {
  with_reader(w, [&](const auto& in) {
    for (std::int64_t i = 0; i < n; i += kWidth) {
      const std::int64_t valid = n - i < kWidth ? n - i : kWidth;
      const F x = valid == kWidth ? in.vec(i) : read_some(in, i, valid);
      const LaneTerms t = terms_of(in, x, lanes_at(code, i, valid), shrink);
      alignas(64) float z[kWidth], e[kWidth];
      std::memcpy(z, &t.zero, sizeof(z));
      std::memcpy(e, &t.error, sizeof(e));
      for (std::int64_t l = 0; l < valid; ++l) {
        zero[i + l] += static_cast<double>(z[l]);
        error[i + l] += static_cast<double>(e[l]);
      }
    }
  });
}

constexpr RoundedKernels kKernels = {QUANTAL_ROUNDED_SET, encode,      encode_each,
                                     range_each,          shrink_step, shrink_step_each};

}  // namespace
}  // namespace quantal

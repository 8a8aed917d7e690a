// The block quantizer primitives for one vector width; see kernels/block_quantize.h for what each
// one does. A file compiled for one instruction set defines QUANTAL_LANES and
// QUANTAL_BLOCK_QUANTIZE_SET, and includes this once.
#pragma once

#include "kernels/block_fit.h"
#include "kernels/block_quantize.h"
#include "kernels/cpu/quantize_lanes_inl.h"

namespace quantal {
namespace {

constexpr int kGroupVectors = static_cast<int>(kShortGroup) / kWidth;
constexpr std::int32_t kInfinityBits = 0x7F800000;
constexpr float kRound = 0x1.8p23F;  // added and taken off: nearest integer, halves to even

using B = std::uint8_t __attribute__((vector_size(kWidth)));

inline F larger(F a, F b) { return a > b ? a : b; }
inline F smaller(F a, F b) { return a < b ? a : b; }

/// Adds one level of a reduction of kWidth registers at once: of a and b, lanes that differ in bit
/// `kStep` are joined; those of a go to lanes without the bit, those of b to lanes with it.
template <int kStep, class V>
inline V join_step(V a, V b) {
  I low, high;
  for (int l = 0; l < kWidth; ++l) {
    const bool second = (l & kStep) != 0;
    low[l] = second ? kWidth + l - kStep : l;
    high[l] = second ? kWidth + l : l + kStep;
  }
  const V x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  return x > y ? x : y;
}

/// Lane l of the result is the largest lane of v[l]; v is overwritten.
template <class V>
inline V highest_of_each(V* v) {
  for (int i = 0; i < kWidth / 2; ++i) v[i] = join_step<1>(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < kWidth / 4; ++i) v[i] = join_step<2>(v[2 * i], v[2 * i + 1]);
  if constexpr (kWidth > 4) {
    for (int i = 0; i < kWidth / 8; ++i) v[i] = join_step<4 % kWidth>(v[2 * i], v[2 * i + 1]);
  }
  if constexpr (kWidth > 8) v[0] = join_step<8 % kWidth>(v[0], v[1]);
  return v[0];
}

/// 1 / d lane by lane, 0 where d is 0 or 1 / d infinite.
inline F inverse_of(F d) {
  const F id = 1.0F / d;
  return magnitude(id) < kInfinityBits ? id : F{};
}

inline void store_bytes(I lanes, std::uint8_t* out) {
  const B bytes = __builtin_convertvector(lanes, B);
  std::memcpy(out, &bytes, sizeof(bytes));
}

/// Writes the low bytes of the lanes of kGroupVectors registers, one group of codes.
inline void store_group(const I* q, std::uint8_t* out) {
#if QUANTAL_LANES == 8
  // Four registers make one: byte 4 l + v is lane l of register v. One permutation sorts them.
  using Bytes = std::uint8_t __attribute__((vector_size(32)));
  const Bytes mixed = (Bytes)((q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | q[3] << 24);
  Bytes order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint8_t>(4 * (i % 8) + i / 8);
  const Bytes sorted = __builtin_shuffle(mixed, order);
  std::memcpy(out, &sorted, sizeof(sorted));
#else
  for (int v = 0; v < kGroupVectors; ++v) store_bytes(q[v], out + v * kWidth);
#endif
}

inline bool below_infinity(I most) {
  for (int l = 0; l < kWidth; ++l) {
    if (most[l] >= kInfinityBits) return false;
  }
  return true;
}

// ------------------------------------------------------------------ groups of 32

// kWidth groups at a time: first the extremes of each, one lane per group, so that the divisions
// are done for all at once; then the codes. Lanes beyond the last group hold zeros.

/// Extremes of up to kWidth groups.
struct Extremes {
  F high, low;
};

template <class In>
inline F read_vector(const In& in, std::int64_t group, int v) {
  return in.vec(group * kShortGroup + v * kWidth);
}

/// Largest magnitudes of groups [first, first + count), as bits; `most` gathers them.
template <class In>
inline I magnitudes(const In& in, std::int64_t first, int count, I* most) {
  I each[kWidth];
  const auto one = [&](int g) {
    I m = magnitude(read_vector(in, first + g, 0));
    for (int v = 1; v < kGroupVectors; ++v) {
      const I next = magnitude(read_vector(in, first + g, v));
      m = next > m ? next : m;
    }
    return m;
  };
  if (count == kWidth) {
    for (int g = 0; g < kWidth; ++g) each[g] = one(g);
  } else {
    for (int g = 0; g < kWidth; ++g) each[g] = g < count ? one(g) : I{};
  }
  const I all_groups = highest_of_each(each);
  *most = all_groups > *most ? all_groups : *most;
  return all_groups;
}

/// Extremes of groups [first, first + count); magnitudes go to `most`, so that one look at the end
/// finds what is not finite.
template <class In>
inline Extremes extremes(const In& in, std::int64_t first, int count, I* most) {
  F high[kWidth], negated[kWidth];
  const auto one = [&](int g) {
    F h = read_vector(in, first + g, 0), l = h;
    I m = magnitude(h);
    for (int v = 1; v < kGroupVectors; ++v) {
      const F x = read_vector(in, first + g, v);
      h = larger(h, x);
      l = smaller(l, x);
      const I next = magnitude(x);
      m = next > m ? next : m;
    }
    *most = m > *most ? m : *most;
    high[g] = h;
    negated[g] = -l;
  };
  if (count == kWidth) {
    for (int g = 0; g < kWidth; ++g) one(g);
  } else {
    for (int g = 0; g < count; ++g) one(g);
    for (int g = count; g < kWidth; ++g) high[g] = negated[g] = F{};
  }
  return {highest_of_each(high), -highest_of_each(negated)};
}

/// Calls body(first, count, in, most) for each kWidth groups of the run; true if all weights were
/// finite.
template <class Body>
inline bool for_each_batch(WeightRun w, std::int64_t groups, Body body) {
  return with_reader(w, [&](const auto& in) {
    I most = {};
    for (std::int64_t g = 0; g < groups; g += kWidth) {
      const std::int64_t left = groups - g;
      body(g, static_cast<int>(left < kWidth ? left : kWidth), in, &most);
    }
    return below_infinity(most);
  });
}

/// The lanes of a register, to be read one by one.
struct Lanes {
  alignas(64) float at[kWidth];
  explicit Lanes(F x) { std::memcpy(at, &x, sizeof(x)); }
};

inline void store_floats(F x, int count, float* out) {
  if (count == kWidth) {
    std::memcpy(out, &x, sizeof(x));
    return;
  }
  for (int l = 0; l < count; ++l) out[l] = x[l];
}

/// The first weight of a group with a given magnitude.
template <class In>
inline float first_of_magnitude(const In& in, std::int64_t group, float wanted) {
  for (std::int64_t i = 0; i < kShortGroup; ++i) {
    const float v = in.one(group * kShortGroup + i);
    if (v == wanted || v == -wanted) return v;
  }
  return 0.0F;
}

inline bool any_lane(I mask) {
  std::int32_t lanes = 0;
  for (int l = 0; l < kWidth; ++l) lanes |= mask[l];
  return lanes != 0;
}

bool extreme32(WeightRun w, std::int64_t groups, int centre, float* scales, std::uint8_t* codes) {
  const float half = static_cast<float>(centre) + 0.5F;
  const I top = all(std::int32_t{2 * centre - 1});
  return for_each_batch(w, groups, [&](std::int64_t first, int count, const auto& in, I* most) {
    const Extremes x = extremes(in, first, count, most);
    F extreme = x.high > -x.low ? x.high : x.low;
    const I tie = (x.high == -x.low) & (x.high != 0.0F);
    if (any_lane(tie)) {
      for (int l = 0; l < count; ++l) {
        if (tie[l] != 0) extreme[l] = first_of_magnitude(in, first + l, x.high[l]);
      }
    }
    extreme = extreme + 0.0F;  // a zero group has the extreme +0
    const F d = extreme / static_cast<float>(-centre), id = inverse_of(d);
    store_floats(d, count, scales + first);
    const Lanes inverse(id);
    for (int g = 0; g < count; ++g) {
      I q[kGroupVectors];
      for (int v = 0; v < kGroupVectors; ++v) {
        q[v] = __builtin_convertvector(read_vector(in, first + g, v) * inverse.at[g] + half, I);
        q[v] = q[v] < top ? q[v] : top;
      }
      store_group(q, codes + (first + g) * kShortGroup);
    }
  });
}

bool range32(WeightRun w, std::int64_t groups, int max_code, float* scales, float* lows,
             std::uint8_t* codes) {
  const I top = all(std::int32_t{max_code});
  return for_each_batch(w, groups, [&](std::int64_t first, int count, const auto& in, I* most) {
    const Extremes x = extremes(in, first, count, most);
    F low = x.low;
    const I zero = low == 0.0F;  // -0 and +0 are equal: the first one is the smallest weight
    if (any_lane(zero)) {
      for (int l = 0; l < count; ++l) {
        if (zero[l] != 0) low[l] = first_of_magnitude(in, first + l, 0.0F);
      }
    }
    const F d = (x.high - low) / static_cast<float>(max_code), id = inverse_of(d);
    store_floats(d + 0.0F, count, scales + first);  // -0 less +0 is -0
    store_floats(low, count, lows + first);
    const Lanes inverse(id), least(low);
    for (int g = 0; g < count; ++g) {
      I q[kGroupVectors];
      for (int v = 0; v < kGroupVectors; ++v) {
        const F above = read_vector(in, first + g, v) - least.at[g];
        q[v] = __builtin_convertvector(above * inverse.at[g] + 0.5F, I);
        q[v] = q[v] < top ? q[v] : top;
      }
      store_group(q, codes + (first + g) * kShortGroup);
    }
  });
}

bool absmax32(WeightRun w, std::int64_t groups, float* scales, std::uint8_t* codes,
              std::int64_t stride) {
  // The largest number below one half: adding it and cutting off rounds halves away from zero.
  const I below_half = all(std::bit_cast<std::int32_t>(0x1.fffffep-2F));
  const I sign = all(std::int32_t{-0x7FFFFFFF - 1});
  return for_each_batch(w, groups, [&](std::int64_t first, int count, const auto& in, I* most) {
    const F d = (F)magnitudes(in, first, count, most) / 127.0F, id = inverse_of(d);
    store_floats(d, count, scales + first);
    const Lanes inverse(id);
    for (int g = 0; g < count; ++g) {
      I q[kGroupVectors];
      for (int v = 0; v < kGroupVectors; ++v) {
        const F y = read_vector(in, first + g, v) * inverse.at[g];
        const F step = (F)(((I)y & sign) | below_half);
        q[v] = __builtin_convertvector(y + step, I);
      }
      store_group(q, codes + (first + g) * stride);
    }
  });
}

// ------------------------------------------------------------------ binary16

/// Binary16 bits of one register. Normal results: rebias the exponent and round the 13 bits that
/// are dropped; subnormal ones: adding 1/2 aligns the wanted bits with the end of the mantissa.
inline I f16_bits(F x) {
  const I bits = (I)x, a = magnitude(x);
  const I sign = (bits >> 16) & 0x8000;
  const I normal = (a - 0x38000000 + 0xFFF + ((a >> 13) & 1)) >> 13;
  const I tiny = (I)((F)a + 0.5F) - 0x3F000000;
  const I finite = a >= 0x38800000 ? normal : tiny;
  const I infinite = all(std::int32_t{0x7C00});
  return sign | (a >= 0x477FF000 ? infinite : finite);
}

bool to_f16(const float* in, std::int64_t n, std::uint16_t* out) {
  I most = {};
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const F x = load_as<F>(in + i);
    const I m = magnitude(x);
    most = m > most ? m : most;
    const H half = __builtin_convertvector(f16_bits(x), H);
    std::memcpy(out + i, &half, sizeof(half));
  }
  bool fits = true;
  for (int l = 0; l < kWidth; ++l) fits = fits && most[l] < 0x477FF000;
  for (; i < n; ++i) {
    out[i] = f32_to_f16(in[i]);
    fits = fits && (out[i] & 0x7FFF) < 0x7C00;
  }
  return fits;
}

// ------------------------------------------------------------------ searches

/// Lane l of the result is lane l + kHalf of x, for the l that a reduction still needs.
template <int kHalf>
inline F upper(F x) {
  I from;
  for (int l = 0; l < kWidth; ++l) from[l] = (l + kHalf) % kWidth;
  return __builtin_shuffle(x, from);
}

/// Sum of the 16 virtual lanes: lane l += lane l + 8, 4, 2, 1.
inline float fold(const F* parts) {
  F half[kParts];
  for (int p = 0; p < kParts; ++p) half[p] = parts[p];
  for (int count = kParts / 2; count > 0; count /= 2) {
    for (int p = 0; p < count; ++p) half[p] += half[p + count];
  }
  F x = half[0];
  if constexpr (kWidth > 8) x += upper<8>(x);
  if constexpr (kWidth > 4) x += upper<4>(x);
  x += upper<2>(x);
  x += upper<1>(x);
  return x[0];
}

/// How a pass turns weights to codes: q = rint(clamp((w + shift) * inv, low, high)).
struct Pass {
  float shift, inv, low, high;
};

inline F nearest_code(F w, const Pass& p) {
  F x = (w + p.shift) * p.inv;
  x = x > p.low ? x : all(p.low);
  x = x < p.high ? x : all(p.high);
  return (x + kRound) - kRound;
}

float encode_nearest(const float* w, std::int64_t n, NearestCode how, std::uint8_t* codes) {
  const Pass pass = {how.shift, finite_inverse(how.scale), static_cast<float>(-how.centre),
                     static_cast<float>(how.max_code - how.centre)};
  F error[kParts] = {};
  for (std::int64_t i = 0; i < n; i += kVirtual) {
    for (int p = 0; p < kParts; ++p) {
      const F x = load_as<F>(w + i + p * kWidth);
      const F q = nearest_code(x, pass);
      const F d = x - (how.scale * q - how.shift);
      error[p] += d * d;
      if (codes == nullptr) continue;
      store_bytes(__builtin_convertvector(q, I) + std::int32_t{how.centre}, codes + i + p * kWidth);
    }
  }
  return fold(error);
}

/// Sums over a group of n weights. Those of the weights alone are made once, the others per pass.
class Sums {
 public:
  Sums(const float* w, std::int64_t n) : w_(w), n_(n) {
    F sum[kParts] = {}, squares[kParts] = {};
    for (std::int64_t i = 0; i < n; i += kVirtual) {
      for (int p = 0; p < kParts; ++p) {
        const F x = load_as<F>(w + i + p * kWidth);
        sum[p] += x;
        squares[p] += x * x;
      }
    }
    sums_.n = static_cast<double>(n);
    sums_.w = fold(sum);
    sums_.ww = fold(squares);
  }

  /// The sum of codes is left at 0 without a shift: the error of such a fit does not depend on it.
  template <bool kShifted>
  const FitSums& of(const Pass& pass) {
    F sq[kParts] = {}, sqq[kParts] = {}, swq[kParts] = {};
    for (std::int64_t i = 0; i < n_; i += kVirtual) {
      for (int p = 0; p < kParts; ++p) {
        const F x = load_as<F>(w_ + i + p * kWidth);
        const F q = nearest_code(x, pass);
        if (kShifted) sq[p] += q;
        sqq[p] += q * q;
        swq[p] += x * q;
      }
    }
    if (kShifted) sums_.q = fold(sq);
    sums_.qq = fold(sqq);
    sums_.wq = fold(swq);
    return sums_;
  }

 private:
  const float* w_;
  std::int64_t n_;
  FitSums sums_;
};

ShiftedFit fit_shifted(const float* w, std::int64_t n, int max_code) {
  float low = 0.0F, high = w[0];
  for (std::int64_t i = 0; i < n; ++i) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  const float range = high - low;
  if (finite_inverse(range) == 0.0F) return {0.0F, -low};
  const auto top = static_cast<float>(max_code);
  ScoredFit best{0, 0, std::numeric_limits<double>::infinity()};
  Sums sums(w, n);
  const auto consider = [&](float shift, float inv) {
    const ScoredFit fit = best_shifted(sums.of<true>({shift, inv, 0.0F, top}));
    if (fit.error < best.error) best = fit;
  };
  for (int step = 0; step < kFitSteps; ++step) consider(-low, (top + fit_offset(step)) / range);
  for (int round = 0; round < kFitRounds; ++round) {
    const float inv = finite_inverse(static_cast<float>(best.scale));
    consider(static_cast<float>(best.shift), inv);
  }
  return {static_cast<float>(best.scale), static_cast<float>(best.shift)};
}

float fit_symmetric(const float* w, std::int64_t n, int centre) {
  float extreme = 0.0F, most = 0.0F;
  for (std::int64_t i = 0; i < n; ++i) {
    const float a = w[i] < 0 ? -w[i] : w[i];
    if (a > most) most = a, extreme = w[i];
  }
  if (finite_inverse(extreme) == 0.0F) return 0.0F;
  const auto bottom = static_cast<float>(-centre);
  const auto top = static_cast<float>(centre - 1);
  ScoredFit best{0, 0, std::numeric_limits<double>::infinity()};
  Sums sums(w, n);
  const auto consider = [&](float inv) {
    const ScoredFit fit = best_symmetric(sums.of<false>({0.0F, inv, bottom, top}));
    if (fit.error < best.error) best = fit;
  };
  for (int step = 0; step < kFitSteps; ++step) consider((bottom - fit_offset(step)) / extreme);
  for (int round = 0; round < kFitRounds; ++round) {
    consider(finite_inverse(static_cast<float>(best.scale)));
  }
  return static_cast<float>(best.scale);
}

constexpr BlockQuantizeKernels kKernels = {QUANTAL_BLOCK_QUANTIZE_SET,
                                           extreme32,
                                           range32,
                                           absmax32,
                                           to_f16,
                                           encode_nearest,
                                           fit_shifted,
                                           fit_symmetric};

}  // namespace
}  // namespace quantal

// From weights to statistics and codes, for host and device: the operations of the scalar
// primitives in kernels/ref and kernels/cpu/row_int8_scalar.cpp in their order, so that the bytes
// are those of the CPU.
#pragma once

#include <cstdint>

#include "kernels/block_fit.h"
#include "kernels/cuda/floats_inl.h"
#include "kernels/cuda/quantizer.h"
#include "kernels/rounded_power.h"
#include "kernels/small_float.h"

namespace quantal::cuda {

/// Smallest and largest of a run; of equal ones the first, so that -0 and +0 are told apart.
struct Extent {
  float low, high;
  std::int32_t low_at, high_at;
  bool finite;
};
QUANTAL_HD Extent no_extent() {
  const float infinity = float_of_bits(0x7F800000U);
  return {infinity, -infinity, 0x7FFFFFFF, 0x7FFFFFFF, true};
}
/// Of two parts of a run, in any order.
QUANTAL_HD Extent joined(const Extent& a, const Extent& b) {
  Extent out = a;
  if (b.low < a.low || (b.low == a.low && b.low_at < a.low_at)) {
    out.low = b.low;
    out.low_at = b.low_at;
  }
  if (b.high > a.high || (b.high == a.high && b.high_at < a.high_at)) {
    out.high = b.high;
    out.high_at = b.high_at;
  }
  out.finite = a.finite && b.finite;
  return out;
}

/// Weight number i of the flattened matrix.
QUANTAL_HD float weight_at(const QuantizeArgs& a, std::int64_t i) {
  const float w = load_float(a.kind, a.weight, i);
  if (a.how.encoder == Encoder::kRowInt8) return round_to<FloatKind::kF16>(w);
  return a.converts ? round_to(a.value_kind, w) : w;
}

/// A group's first weight in the flattened matrix, and how far apart its weights lie.
struct GroupRun {
  std::int64_t begin, step;
};
QUANTAL_HD GroupRun group_run(const QuantizeArgs& a, std::int64_t group) {
  switch (a.group_map) {
    case GroupKind::kColumnRuns:
      return {group, a.groups};
    case GroupKind::kColumnBlocks:
      return {group / a.cols * a.group_size * a.cols + group % a.cols, a.cols};
    default:
      return {group * a.group_size, 1};
  }
}

/// What codes of a group are made with. `scale` and `offset` are stored too, kAffine's scale as its
/// inverse; kTable's offset is 1 where codes are made by division, kMicroscaled's is the byte of
/// the scale.
struct GroupCode {
  float scale, offset;
};

QUANTAL_HD float larger(float a, float b) { return a > b ? a : b; }
QUANTAL_HD float smaller(float a, float b) { return a < b ? a : b; }

// ------------------------------------------------------------------ statistics

QUANTAL_HD GroupCode anchored_code(const Extent& e, int bits) {
  const float range = e.high - e.low;
  if (bits == 1) return {larger(range, kTinyScale), e.low};
  const bool at_low = magnitude(e.low) > magnitude(e.high);
  const float s = larger(range / static_cast<float>((1 << bits) - 1), kTinyScale);
  const float signed_scale = at_low ? s : -s;
  const float edge = at_low ? e.low : e.high;
  const float q0 = rounded(edge / signed_scale);
  if (q0 == 0) return {signed_scale, 0.0F};
  return {edge / q0, edge};
}

/// A shift as a number of codes.
QUANTAL_HD float rounded_zero(const QuantizeArgs& a, float scale, float shift) {
  const float x = round_to(a.value_kind, shift / scale);
  const float inside = x < 0.0F ? 0.0F : a.top < x ? a.top : x;  // -0 stays -0
  return x != x ? 0.0F : rounded(inside);
}

QUANTAL_HD GroupCode shifted_code(const QuantizeArgs& a, const Extent& e) {
  const float range = round_to(a.value_kind, e.high - e.low);
  const float scale = round_to(a.value_kind, range / a.top), shift = -e.low;
  const bool codes = a.how.encoder == Encoder::kRoundedZero && a.how.rounds == 0;
  return {scale, codes ? rounded_zero(a, scale, shift) : shift};
}

QUANTAL_HD GroupCode affine_code(const QuantizeArgs& a, const Extent& e) {
  const float range = e.high - e.low;
  float scale = (1.0F / range) * a.top;
  if (magnitude(range) <= a.how.tiny_range) scale = 1.0F;
  scale = smaller(scale, a.how.largest_scale);
  const float zero = -e.low * scale;
  return {scale, a.how.round_zero ? rounded(zero) : zero};
}

QUANTAL_HD GroupCode microscaled_code(const QuantizeArgs& a, float most) {
  const float unit = round_to(a.kind, most / (a.bits == 4 ? kE2M1Max : kE4M3Max));
  if (a.scale_kind == ScaleKind::kE8M0) {
    const int e = unit == 0 ? 0 : ceil_log2(unit);
    return {power_of_two(e), static_cast<float>((e + 127) & 255)};
  }
  const std::uint8_t byte = e4m3_from_f32(unit);
  return {e4m3_magnitude(byte), static_cast<float>(byte)};
}

/// The first weight of the largest magnitude; +0 of zeros.
QUANTAL_HD float extreme_of(const Extent& e) {
  const float low = magnitude(e.low), high = magnitude(e.high);
  const float extreme = low > high || (low == high && e.low_at < e.high_at) ? e.low : e.high;
  return extreme == 0.0F ? 0.0F : extreme;
}

/// Of a group of `size` weights.
QUANTAL_HD GroupCode group_code(const QuantizeArgs& a, const Extent& e, std::int64_t size) {
  const float most = larger(magnitude(e.low), magnitude(e.high));
  switch (a.how.encoder) {
    case Encoder::kTable: {
      const bool last_short = size < a.group_size;
      return {last_short ? larger(most, a.how.least) : most, last_short ? 1.0F : 0.0F};
    }
    case Encoder::kRowInt8:
      return {most, 0.0F};
    case Encoder::kAnchored:
      return anchored_code(e, a.bits);
    case Encoder::kSymmetric:
      return {round_to(a.value_kind, most / 127.0F), 0.0F};
    case Encoder::kAffine:
      return affine_code(a, e);
    case Encoder::kMicroscaled:
      return microscaled_code(a, most);
    case Encoder::kExtreme:
      return {extreme_of(e) / -a.centre, 0.0F};
    case Encoder::kRange:
      return {(e.high - e.low) / a.top, e.low};
    case Encoder::kLargest:
      return {most / 127.0F, 0.0F};
    default:
      return shifted_code(a, e);
  }
}

// ------------------------------------------------------------------ codes

QUANTAL_HD std::uint32_t table_code(const Quantizer& how, float s) {
  std::uint32_t below = 0;
  QUANTAL_UNROLL
  for (int k = 0; k < 15; ++k) below += how.thresholds[k] < s ? 1 : 0;
  return how.codes[below];
}

/// clamp(rint(r(r(w + shift) / scale)), -zero, top - zero); NaN counts as `nan`.
QUANTAL_HD float centred_code(FloatKind kind, float w, GroupCode g, float zero, float top,
                              float nan) {
  const float x = round_to(kind, round_to(kind, w + g.offset) / g.scale);
  return rounded(smaller(larger(x != x ? nan : x, -zero), top - zero));
}
QUANTAL_HD std::uint32_t rounded_code(const QuantizeArgs& a, float w, GroupCode g, float zero,
                                      float top) {
  const float q = centred_code(a.value_kind, w, g, zero, top, a.how.not_a_number);
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(q + zero));
}

/// kBits: the width, or 0 where any is taken.
template <Encoder kEncoder, int kBits = 0>
QUANTAL_HD std::uint32_t code_of(const QuantizeArgs& a, float w, GroupCode g) {
  if constexpr (kEncoder == Encoder::kTable) {
    const float divisor = larger(g.scale, a.how.least);
    const float s = g.offset != 0.0F ? w / divisor : w * (1.0F / divisor);
    return table_code(a.how, smaller(larger(s, -1.0F), 1.0F));
  } else if constexpr (kEncoder == Encoder::kRowInt8) {
    const float factor = g.scale == 0.0F ? 0.0F : (1.0F / g.scale) * 127.0F;
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(rounded(w * factor)) + 128);
  } else if constexpr (kEncoder == Encoder::kAnchored) {
    const float q = rounded((w - g.offset) / g.scale);
    return static_cast<std::uint32_t>(q > 0 ? smaller(q, a.top) : 0.0F);
  } else if constexpr (kEncoder == Encoder::kAffine) {
    const float x = w * g.scale + g.offset;
    return static_cast<std::uint32_t>(rounded(smaller(x > 0.0F ? x : 0.0F, a.top)));
  } else if constexpr (kEncoder == Encoder::kMicroscaled) {
    const float v = round_to(a.kind, w / g.scale);
    if constexpr (kBits == 4) {
      return nearest_e2m1(v);
    } else {
      return e4m3_from_f32(v);
    }
  } else if constexpr (kEncoder == Encoder::kExtreme) {
    const float q = w * finite_inverse(g.scale) + (a.centre + 0.5F);
    return static_cast<std::uint32_t>(smaller(truncated(q), a.top));
  } else if constexpr (kEncoder == Encoder::kRange) {
    const float q = (w - g.offset) * finite_inverse(g.scale) + 0.5F;
    return static_cast<std::uint32_t>(smaller(truncated(q), a.top));
  } else if constexpr (kEncoder == Encoder::kLargest) {
    const float q = rounded_away(w * finite_inverse(g.scale));
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(q) + 128);
  } else if constexpr (kEncoder == Encoder::kFitTable) {
    const float factor = g.scale == 0.0F ? 0.0F : 1.0F / g.scale / 127.0F;
    return table_code(a.how, smaller(larger(w * factor, -1.0F), 1.0F));
  } else if constexpr (kEncoder == Encoder::kSymmetric) {
    return rounded_code(a, w, {g.scale, 0.0F}, 128.0F, 255.0F);
  } else if constexpr (kEncoder == Encoder::kShifted) {
    return rounded_code(a, w, g, 0.0F, a.top);
  } else {
    return rounded_code(a, w, {g.scale, 0.0F}, g.offset, a.top);
  }
}

// ------------------------------------------------------------------ the half-quadratic solvers

/// Terms of one weight in a step of the solver.
struct SolverTerms {
  float zero, residual;
};
QUANTAL_HD SolverTerms solver_terms(float w, GroupCode g, float top) {
  const float x = w * g.scale + g.offset;
  const float q = rounded(smaller(x > 0.0F ? x : 0.0F, top));
  const float d = w - (q - g.offset) / g.scale;
  const float size = magnitude(d);
  const float shrunk = size - kSolverInverseBeta * power_of_one(size, kSolverPower);
  const float positive = shrunk > 0.0F ? shrunk : 0.0F;
  const float e = float_of_bits(bits_of_float(positive) | (bits_of_float(d) & 0x80000000U));
  return {q - (w - e) * g.scale, size};
}
/// The same as RoundedKernels::shrink_step defines it.
QUANTAL_HD SolverTerms shrink_terms(const QuantizeArgs& a, float w, GroupCode g) {
  const FloatKind kind = a.value_kind;
  const float p = round_to(kind, g.scale * centred_code(kind, w, g, 0.0F, a.top, 0.0F));
  const float d = round_to(kind, w - round_to(kind, p - g.offset));
  const float size = magnitude(d);
  float e = 0.0F;
  if (size > a.shrink.no_shrink) {
    const float power = round_to(kind, power_of_one(size, a.shrink.power));
    const float shrunk = round_to(kind, size - round_to(kind, a.shrink.inverse_beta * power));
    const float positive = shrunk > 0.0F ? shrunk : 0.0F;
    e = float_of_bits(bits_of_float(positive) | (bits_of_float(d) & 0x80000000U));
  }
  return {round_to(kind, p - round_to(kind, w - e)), size};
}

}  // namespace quantal::cuda

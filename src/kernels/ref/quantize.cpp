// The scalar truth of the quantizer primitives.
#include "kernels/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/quantize_power.h"
#include "kernels/ref/floats.h"

namespace quantal {
namespace {

constexpr int kLanes = 16;

using ref::weight;

/// NaN and infinities have the largest bit patterns of all magnitudes.
std::uint32_t magnitude_bits(float x) { return std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu; }
constexpr std::uint32_t kInfinityBits = 0x7F800000u;

float absmax(WeightRun w, std::int64_t n) {
  std::uint32_t most = 0;
  for (std::int64_t i = 0; i < n; ++i) most = std::max(most, magnitude_bits(weight(w, i)));
  return std::bit_cast<float>(most);
}

void encode_table(const TableQuantizer& table, WeightRun w, std::int64_t n, float factor,
                  bool divide, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = weight(w, i);
    const float s = std::min(std::max(divide ? x / factor : x * factor, -1.0F), 1.0F);
    std::size_t below = 0;
    for (std::size_t k = 0; k < 15; ++k) below += table.thresholds[k] < s;
    codes[i] = table.codes[below];
  }
}

/// Adds up `lanes` as lane l += lane l + 8, 4, 2, 1.
double fold(std::array<double, kLanes> lanes) {
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

float lower(float a, float b) { return b < a ? b : a; }
float higher(float a, float b) { return b > a ? b : a; }

Range range(WeightRun w, std::int64_t n) {
  Range r{std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), true};
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = weight(w, i);
    r.low = lower(r.low, x);
    r.high = higher(r.high, x);
    r.finite = r.finite && magnitude_bits(x) < kInfinityBits;
  }
  return r;
}

bool range_columns(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count, float* low,
                   float* high) {
  std::uint32_t most = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    low[j] = std::numeric_limits<float>::infinity();
    high[j] = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < n; ++i) {
      const float x = weight(w, i * stride + j);
      low[j] = lower(low[j], x);
      high[j] = higher(high[j], x);
      most = std::max(most, magnitude_bits(x));
    }
  }
  return most < kInfinityBits;
}

float power_one(float a) {
  const auto bits = std::bit_cast<std::int64_t>(static_cast<double>(a));
  const std::int64_t k = (bits - kSqrtHalfBits) >> 52;
  const double t = std::bit_cast<double>(bits - (k << 52)) - 1.0;
  double log2 = kLog2Poly.back();
  for (std::size_t i = kLog2Poly.size() - 1; i-- > 0;) log2 = log2 * t + kLog2Poly[i];
  log2 = log2 * t + static_cast<double>(k);
  const double y = static_cast<double>(kSolverPower) * log2;
  const double whole = std::nearbyint(y);
  const double f = y - whole;
  double exp2 = kExp2Poly.back();
  for (std::size_t i = kExp2Poly.size() - 1; i-- > 0;) exp2 = exp2 * f + kExp2Poly[i];
  const auto scale = static_cast<std::int64_t>(whole) + 1023;
  return static_cast<float>(exp2 * std::bit_cast<double>(scale << 52));
}

float affine_code(float w, AffineCode code) {
  const float x = w * code.scale + code.zero;
  const float floored = x > 0.0F ? x : 0.0F;
  return std::nearbyint(floored < code.max_code ? floored : code.max_code);
}

/// One element of a solver step: its term of the zero and its residual.
struct Term {
  float zero, residual;
};
Term solver_term(float w, AffineCode code) {
  const float q = affine_code(w, code);
  const float r = (q - code.zero) / code.scale;
  const float d = w - r;
  const float a = std::fabs(d);
  const float shrunk = a - kSolverInverseBeta * power_one(a);
  const float e = std::copysign(shrunk > 0.0F ? shrunk : 0.0F, d);
  return {q - (w - e) * code.scale, a};
}

SolverSums solver_step(WeightRun w, std::int64_t n, AffineCode code) {
  std::array<double, kLanes> zero{}, error{};
  for (std::int64_t i = 0; i < n; ++i) {
    const Term term = solver_term(weight(w, i), code);
    zero[static_cast<std::size_t>(i % kLanes)] += static_cast<double>(term.zero);
    error[static_cast<std::size_t>(i % kLanes)] += static_cast<double>(term.residual);
  }
  return {fold(zero), fold(error)};
}

void solver_step_columns(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count,
                         const float* scale, const float* zero, float max_code, SolverSums* sums) {
  for (std::int64_t j = 0; j < count; ++j) {
    sums[j] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      const Term term = solver_term(weight(w, i * stride + j), {scale[j], zero[j], max_code});
      sums[j].zero += static_cast<double>(term.zero);
      sums[j].error += static_cast<double>(term.residual);
    }
  }
}

void encode_affine(WeightRun w, std::int64_t n, AffineCode code, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<std::uint8_t>(affine_code(weight(w, i), code));
  }
}

void encode_affine_each(WeightRun w, std::int64_t n, const float* scale, const float* zero,
                        float max_code, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<std::uint8_t>(affine_code(weight(w, i), {scale[i], zero[i], max_code}));
  }
}

void power(const float* in, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = power_one(in[i]);
}

}  // namespace

const QuantizeKernels& quantize_kernels_scalar() {
  static constexpr QuantizeKernels kKernels = {
      "scalar",           absmax,      encode_table,        range,
      range_columns,      solver_step, solver_step_columns, encode_affine,
      encode_affine_each, power};
  return kKernels;
}

}  // namespace quantal

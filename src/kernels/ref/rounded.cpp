// The scalar truth of the rounded quantizer primitives.
#include "kernels/rounded.h"

#include <array>
#include <cmath>

#include "kernels/ref/floats.h"
#include "kernels/rounded_power.h"

namespace quantal {
namespace {

constexpr std::size_t kLanes = 16;

using ref::round_to, ref::weight;

/// Code of one weight, before `zero` is added.
float centred_code(DType dtype, float w, const RoundedCode& c) {
  float x = round_to(dtype, round_to(dtype, w + c.shift) / c.scale);
  if (std::isnan(x)) x = c.not_a_number;
  return std::nearbyint(std::fmin(std::fmax(x, -c.zero), c.max_code - c.zero));
}

RoundedCode code_at(const RoundedCodes& c, std::int64_t i) {
  return {c.scale[i], c.shift[i], c.zero[i], c.max_code, c.not_a_number};
}

std::uint8_t code_of(WeightRun w, std::int64_t i, const RoundedCode& c) {
  return static_cast<std::uint8_t>(
      static_cast<int>(centred_code(w.dtype, weight(w, i), c) + c.zero));
}

void encode(WeightRun w, std::int64_t n, const RoundedCode& code, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) codes[i] = code_of(w, i, code);
}

void encode_each(WeightRun w, std::int64_t n, const RoundedCodes& code, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) codes[i] = code_of(w, i, code_at(code, i));
}

bool range_each(WeightRun w, std::int64_t n, float* low, float* high) {
  bool finite = true;
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = weight(w, i);
    finite = finite && std::isfinite(x);
    low[i] = x < low[i] ? x : low[i];
    high[i] = x > high[i] ? x : high[i];
  }
  return finite;
}

struct Terms {
  float zero = 0, error = 0;
};

Terms terms_of(WeightRun run, std::int64_t i, const RoundedCode& code, const Shrink& shrink) {
  const auto r = [&](float x) { return round_to(run.dtype, x); };
  const float w = weight(run, i);
  const float p = r(code.scale * centred_code(run.dtype, w, code));
  const float d = r(w - r(p - code.shift));
  const float a = std::fabs(d);
  float e = 0;
  if (a > shrink.no_shrink) {
    const float bound = r(shrink.inverse_beta * r(power_of_one(a, shrink.power)));
    e = std::copysign(std::fmax(r(a - bound), 0.0F), d);
  }
  return {r(p - r(w - e)), a};
}

SolverSums shrink_step(WeightRun w, std::int64_t n, const RoundedCode& code, const Shrink& shrink) {
  std::array<double, kLanes> zero{}, error{};
  for (std::int64_t i = 0; i < n; ++i) {
    const Terms t = terms_of(w, i, code, shrink);
    zero[static_cast<std::size_t>(i) % kLanes] += static_cast<double>(t.zero);
    error[static_cast<std::size_t>(i) % kLanes] += static_cast<double>(t.error);
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) {
      zero[l] += zero[l + half];
      error[l] += error[l + half];
    }
  }
  return {zero[0], error[0]};
}

void shrink_step_each(WeightRun w, std::int64_t n, const RoundedCodes& code, const Shrink& shrink,
                      double* zero, double* error) {
  for (std::int64_t i = 0; i < n; ++i) {
    const Terms t = terms_of(w, i, code_at(code, i), shrink);
    zero[i] += static_cast<double>(t.zero);
    error[i] += static_cast<double>(t.error);
  }
}

}  // namespace

const RoundedKernels& rounded_kernels_scalar() {
  static constexpr RoundedKernels kKernels = {"scalar",   encode,      encode_each,
                                              range_each, shrink_step, shrink_step_each};
  return kKernels;
}

}  // namespace quantal

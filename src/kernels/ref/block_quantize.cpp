// The scalar truth of the block quantizer primitives.
#include "kernels/block_quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "kernels/block_fit.h"
#include "kernels/ref/floats.h"

namespace quantal {
namespace {

constexpr int kLanes = 16;

using ref::weight;

std::array<float, kShortGroup> group_of(WeightRun w, std::int64_t group, bool* finite) {
  std::array<float, kShortGroup> x;
  for (std::int64_t i = 0; i < kShortGroup; ++i) {
    x[static_cast<std::size_t>(i)] = weight(w, group * kShortGroup + i);
    *finite = *finite && std::isfinite(x[static_cast<std::size_t>(i)]);
  }
  return x;
}

bool extreme32(WeightRun w, std::int64_t groups, int centre, float* scales, std::uint8_t* codes) {
  bool finite = true;
  for (std::int64_t g = 0; g < groups; ++g) {
    const auto x = group_of(w, g, &finite);
    if (!finite) return false;
    float extreme = 0.0F;
    for (const float v : x) {
      if (std::fabs(v) > std::fabs(extreme)) extreme = v;
    }
    const float d = extreme / static_cast<float>(-centre), id = finite_inverse(d);
    scales[g] = d;
    for (const float v : x) {
      const int q = static_cast<int>(v * id + (static_cast<float>(centre) + 0.5F));
      *codes++ = static_cast<std::uint8_t>(std::min(q, 2 * centre - 1));
    }
  }
  return true;
}

bool range32(WeightRun w, std::int64_t groups, int max_code, float* scales, float* lows,
             std::uint8_t* codes) {
  bool finite = true;
  for (std::int64_t g = 0; g < groups; ++g) {
    const auto x = group_of(w, g, &finite);
    if (!finite) return false;
    float low = x[0], high = x[0];
    for (const float v : x) {
      if (v < low) low = v;
      if (v > high) high = v;
    }
    const float d = (high - low) / static_cast<float>(max_code), id = finite_inverse(d);
    scales[g] = d;
    lows[g] = low;
    for (const float v : x) {
      const int q = static_cast<int>((v - low) * id + 0.5F);
      *codes++ = static_cast<std::uint8_t>(std::min(q, max_code));
    }
  }
  return true;
}

bool absmax32(WeightRun w, std::int64_t groups, float* scales, std::uint8_t* codes,
              std::int64_t stride) {
  bool finite = true;
  for (std::int64_t g = 0; g < groups; ++g) {
    const auto x = group_of(w, g, &finite);
    if (!finite) return false;
    float most = 0.0F;
    for (const float v : x) most = std::max(most, std::fabs(v));
    const float d = most / 127.0F, id = finite_inverse(d);
    scales[g] = d;
    for (std::size_t i = 0; i < x.size(); ++i) {
      codes[i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(std::round(x[i] * id)));
    }
    codes += stride;
  }
  return true;
}

bool to_f16(const float* in, std::int64_t n, std::uint16_t* out) {
  bool fits = true;
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = f32_to_f16(in[i]);
    fits = fits && (out[i] & 0x7FFF) < 0x7C00;
  }
  return fits;
}

/// Adds up `lanes` as lane l += lane l + 8, 4, 2, 1.
float fold(std::array<float, kLanes> lanes) {
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

/// Nearest integer of x in [low, high], halves to even.
float nearest(float x, float low, float high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  return std::nearbyint(x);
}

float encode_nearest(const float* w, std::int64_t n, NearestCode how, std::uint8_t* codes) {
  const float inv = finite_inverse(how.scale);
  const auto low = static_cast<float>(-how.centre);
  const auto high = static_cast<float>(how.max_code - how.centre);
  std::array<float, kLanes> error{};
  for (std::int64_t i = 0; i < n; ++i) {
    const float q = nearest((w[i] + how.shift) * inv, low, high);
    const float d = w[i] - (how.scale * q - how.shift);
    error[static_cast<std::size_t>(i % kLanes)] += d * d;
    if (codes != nullptr) codes[i] = static_cast<std::uint8_t>(static_cast<int>(q) + how.centre);
  }
  return fold(error);
}

/// How a pass of a search turns weights to codes: nearest((w + shift) * inv, low, high).
struct Pass {
  float shift, inv, low, high;
};

FitSums sums_of(const float* w, std::int64_t n, Pass pass) {
  std::array<float, kLanes> sw{}, sww{}, sq{}, sqq{}, swq{};
  for (std::int64_t i = 0; i < n; ++i) {
    const auto l = static_cast<std::size_t>(i % kLanes);
    const float q = nearest((w[i] + pass.shift) * pass.inv, pass.low, pass.high);
    sw[l] += w[i];
    sww[l] += w[i] * w[i];
    sq[l] += q;
    sqq[l] += q * q;
    swq[l] += w[i] * q;
  }
  return {static_cast<double>(n), fold(sw), fold(sww), fold(sq), fold(sqq), fold(swq)};
}

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
  const auto consider = [&](float shift, float inv) {
    const ScoredFit fit = best_shifted(sums_of(w, n, {shift, inv, 0.0F, top}));
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
  float extreme = 0.0F;
  for (std::int64_t i = 0; i < n; ++i) {
    if (std::fabs(w[i]) > std::fabs(extreme)) extreme = w[i];
  }
  if (finite_inverse(extreme) == 0.0F) return 0.0F;
  const auto bottom = static_cast<float>(-centre);
  const auto top = static_cast<float>(centre - 1);
  ScoredFit best{0, 0, std::numeric_limits<double>::infinity()};
  const auto consider = [&](float inv) {
    const ScoredFit fit = best_symmetric(sums_of(w, n, {0.0F, inv, bottom, top}));
    if (fit.error < best.error) best = fit;
  };
  for (int step = 0; step < kFitSteps; ++step) consider((bottom - fit_offset(step)) / extreme);
  for (int round = 0; round < kFitRounds; ++round) {
    consider(finite_inverse(static_cast<float>(best.scale)));
  }
  return static_cast<float>(best.scale);
}

constexpr BlockQuantizeKernels kKernels = {"scalar", extreme32,      range32,     absmax32,
                                           to_f16,   encode_nearest, fit_shifted, fit_symmetric};

}  // namespace

const BlockQuantizeKernels& block_quantize_kernels_scalar() { return kKernels; }

}  // namespace quantal

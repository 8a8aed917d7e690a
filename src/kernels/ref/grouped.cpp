// The scalar truth of the grouped quantizer primitives.
#include "kernels/grouped.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/ref/floats.h"
#include "kernels/small_float.h"

namespace quantal {
namespace {

using ref::weight;

/// Scale and bias of a group that lies in [low, high].
void anchor(float low, float high, int bits, float* scale, float* bias) {
  const float range = high - low;
  if (bits == 1) {
    *scale = std::max(range, kTinyScale);
    *bias = low;
    return;
  }
  const bool at_low = std::fabs(low) > std::fabs(high);
  const float s = std::max(range / static_cast<float>((1 << bits) - 1), kTinyScale);
  const float signed_scale = at_low ? s : -s;
  const float edge = at_low ? low : high;
  const float q0 = std::nearbyint(edge / signed_scale);
  *scale = q0 != 0 ? edge / q0 : signed_scale;
  *bias = q0 != 0 ? edge : 0.0F;
}

bool encode_anchored(const AnchoredRun& run) {
  const auto top = static_cast<float>((1 << run.bits) - 1);
  for (std::int64_t g = 0; g < run.groups; ++g) {
    const std::int64_t begin = g * run.group_size, end = begin + run.group_size;
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (std::int64_t i = begin; i < end; ++i) {
      const float x = weight(run.weights, i);
      if (!std::isfinite(x)) return false;
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    anchor(low, high, run.bits, &run.scales[g], &run.biases[g]);
    for (std::int64_t i = begin; i < end; ++i) {
      const float q = std::nearbyint((weight(run.weights, i) - run.biases[g]) / run.scales[g]);
      run.codes[i] = static_cast<std::uint8_t>(q > 0 ? std::min(q, top) : 0.0F);  // NaN is 0
    }
  }
  return true;
}

bool encode_microscaled(const MicroscaledRun& run) {
  const DType dtype = run.weights.dtype;
  const float most = run.element == CodeMap::kE2M1 ? kE2M1Max : kE4M3Max;
  for (std::int64_t g = 0; g < run.groups; ++g) {
    const std::int64_t begin = g * run.group_size, end = begin + run.group_size;
    float largest = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const float x = std::fabs(weight(run.weights, i));
      if (!std::isfinite(x)) return false;
      largest = std::max(largest, x);
    }
    const float unit = rounded_to(dtype, largest / most);
    float divisor = 0;
    if (run.scale == ScaleSource::kE8M0) {
      const int e = unit == 0 ? 0 : ceil_log2(unit);
      run.scales[g] = static_cast<std::uint8_t>(e + 127);
      divisor = power_of_two(e);
    } else {
      run.scales[g] = e4m3_from_f32(unit);
      divisor = e4m3_magnitude(run.scales[g]);
    }
    for (std::int64_t i = begin; i < end; ++i) {
      const float v = rounded_to(dtype, weight(run.weights, i) / divisor);
      run.codes[i] = run.element == CodeMap::kE2M1 ? nearest_e2m1(v) : e4m3_from_f32(v);
    }
  }
  return true;
}

void narrow(DType dtype, const float* in, std::int64_t n, void* out) {
  narrow_from_f32(dtype, in, n, out);
}

}  // namespace

const GroupedKernels& grouped_kernels_scalar() {
  static constexpr GroupedKernels kKernels = {"scalar", encode_anchored, encode_microscaled,
                                              narrow};
  return kKernels;
}

}  // namespace quantal

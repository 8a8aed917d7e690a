// Encoders of super-blocks. The format leaves the choice of scales open; these search for small
// squared errors: the best scale (and shift) of each sub-block on its own, then super-scales that
// hold the largest of them, then for each sub-block the best of the neighbouring 6- or 8-bit
// sub-scales, judged by the error of the weights as they will be decoded.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/half.h"
#include "formats/gguf/blocks.h"
#include "formats/gguf/gguf_encode.h"
#include "kernels/block_fit.h"

namespace quantal::gguf {
namespace {

using namespace formats::gguf;

bool is_infinite(std::uint16_t half) { return (half & 0x7C00) == 0x7C00; }

/// The integer in [low, high] nearest to value / unit; 0 where the unit is 0.
int nearest_step(float value, float unit, int low, int high) {
  if (unit == 0.0F) return 0;
  const float steps = std::nearbyint(value / unit);
  return static_cast<int>(std::clamp(steps, static_cast<float>(low), static_cast<float>(high)));
}

/// Chooses sub-scale and sub-offset of sub-block `j` and writes its codes; returns its error.
float choose_shifted(const BlockQuantizeKernels& kernels, const float* w, int max_code,
                     ShiftedFit fit, int j, Parts& parts) {
  const float d = f16_to_f32(parts.scale), dmin = f16_to_f32(parts.offset);
  const int scale = nearest_step(fit.scale, d, 0, kMostSubScale);
  const int offset = nearest_step(fit.shift, dmin, 0, kMostSubScale);
  float best = std::numeric_limits<float>::infinity();
  NearestCode chosen{.max_code = max_code};
  const auto from = [](int x) { return std::max(0, x - kNeighbours); };
  const auto to = [](int x) { return std::min(kMostSubScale, x + kNeighbours); };
  for (int s = from(scale); s <= to(scale); ++s) {
    for (int m = from(offset); m <= to(offset); ++m) {
      const NearestCode how{.scale = d * static_cast<float>(s),
                            .shift = dmin * static_cast<float>(m),
                            .centre = 0,
                            .max_code = max_code};
      const float error = kernels.encode_nearest(w, 32, how, nullptr);
      if (!(error < best)) continue;
      best = error;
      chosen = how;
      parts.scales[j] = static_cast<std::uint8_t>(s);
      parts.offsets[j] = static_cast<std::uint8_t>(m);
    }
  }
  return kernels.encode_nearest(w, 32, chosen, parts.codes + 32 * j);
}

/// Chooses the sub-scale of sub-block `j` of 16 and writes its codes; returns its error.
float choose_symmetric(const BlockQuantizeKernels& kernels, const float* w, float fit, int j,
                       Parts& parts) {
  const float d = f16_to_f32(parts.scale);
  const int scale = nearest_step(fit, d, -128, 127);
  float best = std::numeric_limits<float>::infinity();
  NearestCode chosen{.centre = 32, .max_code = 63};
  for (int s = std::max(-128, scale - kNeighbours); s <= std::min(127, scale + kNeighbours); ++s) {
    const NearestCode how{
        .scale = d * static_cast<float>(s), .shift = 0.0F, .centre = 32, .max_code = 63};
    const float error = kernels.encode_nearest(w, 16, how, nullptr);
    if (!(error < best)) continue;
    best = error;
    chosen = how;
    parts.scales[j] = static_cast<std::uint8_t>(s);
  }
  return kernels.encode_nearest(w, 16, chosen, parts.codes + 16 * j);
}

/// Repeats `choose(parts)`, which returns the error of the super-block, with the super-scales that
/// fit its result best, as long as the error falls. False if the first ones are no binary16.
template <class Choose, class Refit>
bool refine(Parts& parts, Choose choose, Refit refit) {
  if (is_infinite(parts.scale) || is_infinite(parts.offset)) return false;
  double error = choose(parts);
  for (int round = 0; round < kSuperRounds; ++round) {
    Parts next = parts;
    const ShiftedFit fit = refit(parts);
    next.scale = f32_to_f16(fit.scale);
    next.offset = f32_to_f16(fit.shift);
    if (is_infinite(next.scale) || is_infinite(next.offset)) break;
    const double next_error = choose(next);
    if (!(next_error < error)) break;
    error = next_error;
    parts = next;
  }
  return true;
}

/// Q4_K (max_code 15) and Q5_K (31): w ~ (d * scale_j) * q - dmin * offset_j.
bool encode_shifted(const BlockQuantizeKernels& kernels, const float* w, int max_code,
                    Parts& parts) {
  std::array<ShiftedFit, 8> fits;
  float largest = 0.0F, deepest = 0.0F;
  for (std::size_t j = 0; j < 8; ++j) {
    fits[j] = kernels.fit_shifted(w + 32 * j, 32, max_code);
    largest = std::max(largest, fits[j].scale);
    deepest = std::max(deepest, fits[j].shift);
  }
  parts.scale = f32_to_f16(largest / static_cast<float>(kMostSubScale));
  parts.offset = f32_to_f16(deepest / static_cast<float>(kMostSubScale));
  const auto choose = [&](Parts& p) {
    double error = 0;
    for (int j = 0; j < 8; ++j) {
      error += double{
          choose_shifted(kernels, w + 32 * j, max_code, fits[static_cast<std::size_t>(j)], j, p)};
    }
    return error;
  };
  const auto refit = [&](const Parts& p) {
    SuperFit fit;
    for (int i = 0; i < kSuperWeights; ++i) {
      fit.add(w[i], p.scales[i / 32] * p.codes[i], p.offsets[i / 32]);
    }
    const ShiftedFit best = fit.solve();
    return ShiftedFit{std::max(best.scale, 0.0F), std::max(best.shift, 0.0F)};
  };
  return refine(parts, choose, refit);
}

/// Q6_K: w ~ (d * scale_j) * (q - 32), scale_j a signed byte. The largest scale becomes -128, so
/// that all 256 steps are used.
bool encode_symmetric(const BlockQuantizeKernels& kernels, const float* w, Parts& parts) {
  std::array<float, 16> fits;
  float largest = 0.0F;
  for (std::size_t j = 0; j < 16; ++j) {
    fits[j] = kernels.fit_symmetric(w + 16 * j, 16, 32);
    if (std::fabs(fits[j]) > std::fabs(largest)) largest = fits[j];
  }
  parts.scale = f32_to_f16(largest / -128.0F);
  parts.offset = 0;
  const auto choose = [&](Parts& p) {
    double error = 0;
    for (int j = 0; j < 16; ++j) {
      error +=
          double{choose_symmetric(kernels, w + 16 * j, fits[static_cast<std::size_t>(j)], j, p)};
    }
    return error;
  };
  const auto refit = [&](const Parts& p) {
    SuperFit fit;
    for (int i = 0; i < kSuperWeights; ++i) {
      fit.add(w[i], static_cast<std::int8_t>(p.scales[i / 16]) * (p.codes[i] - 32), 0.0);
    }
    return fit.solve();
  };
  return refine(parts, choose, refit);
}

template <class Block>
void store(const Parts& parts, std::uint8_t* out) {
  Block block;
  put_together(parts, block);
  std::memcpy(out, &block, sizeof(block));
}

}  // namespace

EncodeStatus encode_blocks256(GgmlType type, WeightRun weights, std::int64_t n, std::uint8_t* out) {
  const BlockQuantizeKernels& kernels = block_quantize_kernels();
  const std::int64_t bytes = ggml_block(type).bytes;
  alignas(64) float w[kSuperWeights];
  Parts parts{};
  for (std::int64_t i = 0; i < n; i += kSuperWeights, out += bytes) {
    widen_to_f32(weights.dtype, weights.at(i).data, kSuperWeights, w);
    const float most = quantize_kernels().absmax({DType::kF32, w}, kSuperWeights);
    if (!std::isfinite(most)) return EncodeStatus::kNotFinite;
    if (most > kLargestSearched) return EncodeStatus::kTooLarge;
    if (type == GgmlType::kQ6_K) {
      if (!encode_symmetric(kernels, w, parts)) return EncodeStatus::kTooLarge;
      store<Q6_K>(parts, out);
    } else {
      const bool five = type == GgmlType::kQ5_K;
      if (!encode_shifted(kernels, w, five ? 31 : 15, parts)) return EncodeStatus::kTooLarge;
      five ? store<Q5_K>(parts, out) : store<Q4_K>(parts, out);
    }
  }
  return EncodeStatus::kDone;
}

}  // namespace quantal::gguf

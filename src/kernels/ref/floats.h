// Elements of runs and roundings, as the references have them.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "kernels/quantize.h"

namespace quantal::ref {

/// Element i of a run.
inline float weight(WeightRun w, std::int64_t i) {
  if (w.dtype == DType::kF32) return static_cast<const float*>(w.data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(w.data)[i];
  return w.dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

/// The nearest value of `dtype`, one of the three float types, half to even.
inline float round_to(DType dtype, float x) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(x));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(x));
  return x;
}

}  // namespace quantal::ref

// Quantizer primitives whose every operation is rounded to the dtype of the weights: float32,
// binary16 or bfloat16, half to even. r() below is that rounding.
//
// One set per instruction set, all with identical results; sums run over 16 virtual lanes (element
// i goes to lane i mod 16) in double and are combined as lane l += lane l + 8, 4, 2, 1. They know
// nothing of dialects; buffers must be valid, nothing is checked here and nothing throws.
#pragma once

#include <cstdint>

#include "kernels/quantize.h"

namespace quantal {

/// Affine codes of a group. `scale` and `shift` are numbers of the weights' dtype in weight units,
/// `zero` an integer in codes. A quotient that is not a number counts as `not_a_number`.
struct RoundedCode {
  float scale = 1;
  float shift = 0;
  float zero = 0;
  float max_code = 15;
  float not_a_number = 0;
};

/// Groups that lie side by side, each a column of a block of rows, add their residuals in runs of
/// so many columns.
inline constexpr std::int64_t kColumnChunk = 512;

/// The same with one scale, shift and zero per element.
struct RoundedCodes {
  const float* scale = nullptr;
  const float* shift = nullptr;
  const float* zero = nullptr;
  float max_code = 15;
  float not_a_number = 0;
};

/// Shrinking of residuals in one step of a solver: e = sign(d) * max(r(|d| - r(inverse_beta *
/// r(|d|^power))), 0). The caller promises that e is 0 for |d| <= no_shrink.
struct Shrink {
  float inverse_beta = 0.1F;
  float power = -0.3F;
  float no_shrink = 0;
};

struct RoundedKernels {
  const char* name;

  /// codes[i] = clamp(rint(r(r(w[i] + shift) / scale)) + zero, 0, max_code).
  void (*encode)(WeightRun w, std::int64_t n, const RoundedCode& code, std::uint8_t* codes);
  void (*encode_each)(WeightRun w, std::int64_t n, const RoundedCodes& code, std::uint8_t* codes);

  /// low[i] = min(low[i], w[i]), high[i] = max(high[i], w[i]); of equal ones the old stays. Returns
  /// false if a weight is not finite.
  bool (*range_each)(WeightRun w, std::int64_t n, float* low, float* high);

  /// With q the code of w, p = r(scale * q), d = r(w - r(p - shift)) and e its shrunken residual:
  /// sums of r(p - r(w - e)) (SolverSums::zero) and of |d| (SolverSums::error).
  SolverSums (*shrink_step)(WeightRun w, std::int64_t n, const RoundedCode& code,
                            const Shrink& shrink);
  /// The same with element i added to zero[i] and error[i].
  void (*shrink_step_each)(WeightRun w, std::int64_t n, const RoundedCodes& code,
                           const Shrink& shrink, double* zero, double* error);
};

/// The set of active_cpu_kernels().
const RoundedKernels& rounded_kernels();

/// The obvious statement of the above (always available; the set named "scalar").
const RoundedKernels& rounded_kernels_scalar();
const RoundedKernels& rounded_kernels_avx2();
const RoundedKernels& rounded_kernels_avx512();
const RoundedKernels& rounded_kernels_neon();

}  // namespace quantal

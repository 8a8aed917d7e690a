// Primitives for quantizers whose groups are short and independent: groups of 32 in one pass, and
// searches for the best scale of a group of 16 or 32.
//
// The rules of kernels/quantize.h hold here too: one set per instruction set with identical
// results; every operation is float32 with one rounding, never contracted; sums run over 16 virtual
// lanes (element i in lane i mod 16) and are combined as lane l += lane l + 8, 4, 2, 1. Nothing is
// checked and nothing throws.
#pragma once

#include <cstdint>

#include "kernels/quantize.h"

namespace quantal {

/// Weights per group of the `*32` primitives.
inline constexpr std::int64_t kShortGroup = 32;

/// w is stored as scale * (code - centre) - shift, code in 0 .. max_code.
struct NearestCode {
  float scale = 0;
  float shift = 0;
  int centre = 0;
  int max_code = 15;
};

/// Scale and shift (>= 0) of a fit.
struct ShiftedFit {
  float scale = 0;
  float shift = 0;
};

struct BlockQuantizeKernels {
  const char* name;

  /// One scale per group, from the weight e of largest magnitude (the first of equals, sign kept):
  ///   d = e / -centre;  id = 1 / d
  ///   code = min(trunc(w * id + (centre + 0.5)), 2 * centre - 1)
  /// `groups` groups of 32 weights into scales [groups] (d, before any rounding to its storage) and
  /// codes [groups * 32], one per byte. id is 0 where d is 0 or 1 / d is infinite. Returns false if
  /// a weight is not finite; the results mean nothing then. The same holds for the next two.
  bool (*extreme32)(WeightRun w, std::int64_t groups, int centre, float* scales,
                    std::uint8_t* codes);

  /// Scale and smallest weight per group:
  ///   d = (high - low) / max_code;  id = 1 / d;  code = min(trunc((w - low) * id + 0.5), max_code)
  bool (*range32)(WeightRun w, std::int64_t groups, int max_code, float* scales, float* lows,
                  std::uint8_t* codes);

  /// d = max|w| / 127;  code = w * id rounded, halves away from zero, as a signed byte. The codes
  /// of group g begin at codes + g * stride.
  bool (*absmax32)(WeightRun w, std::int64_t groups, float* scales, std::uint8_t* codes,
                   std::int64_t stride);

  /// out[i] = binary16(in[i]), half to even; returns false if a value does not fit (65520 and
  /// above, which become infinite).
  bool (*to_f16)(const float* in, std::int64_t n, std::uint16_t* out);

  /// Codes of n weights (a multiple of 16), code = clamp(rint((w + shift) / scale), -centre,
  /// max_code - centre) + centre with the division as a product by 1 / scale; all `centre` where
  /// 1 / scale is not finite. Returns the sum of squares of w - (scale * (code - centre) - shift).
  /// `codes` may be null.
  float (*encode_nearest)(const float* w, std::int64_t n, NearestCode how, std::uint8_t* codes);

  /// Scale and shift of w ~ scale * q - shift, q in 0 .. max_code, shift >= 0, with a small sum of
  /// squared errors: least squares for the codes of kFitSteps step widths around the range of the
  /// weights, then kFitRounds rounds of codes for the best fit and least squares for those codes.
  /// n a multiple of 16, at most 64.
  ShiftedFit (*fit_shifted)(const float* w, std::int64_t n, int max_code);

  /// Scale of w ~ scale * (q - centre), q in 0 .. 2 * centre - 1, by the same search.
  float (*fit_symmetric)(const float* w, std::int64_t n, int centre);
};

/// Step widths that the searches try: (max_code + t) / range for t = -1 .. 1, and
/// (centre + t) / max|w|, in equal steps.
inline constexpr int kFitSteps = 21;
inline constexpr float kFitSpread = 0.1F;
inline constexpr int kFitRounds = 2;

/// The set of active_cpu_kernels().
const BlockQuantizeKernels& block_quantize_kernels();

/// The obvious statement of the above (always available; the set named "scalar").
const BlockQuantizeKernels& block_quantize_kernels_scalar();
const BlockQuantizeKernels& block_quantize_kernels_avx2();
const BlockQuantizeKernels& block_quantize_kernels_avx512();
const BlockQuantizeKernels& block_quantize_kernels_neon();

}  // namespace quantal

// Steps of the searches of kernels/block_quantize.h that stand between two passes over a group:
// plain double arithmetic on its sums, the same for every instruction set and on a device.
//
// Internal linkage on purpose: files compiled for one instruction set include this.
#pragma once

#include "kernels/block_quantize.h"
#include "kernels/host_device.h"

namespace quantal {
namespace {  // NOLINT: see above

/// Sums over a group: of w, w^2, and of its codes q (centre taken off).
struct FitSums {
  double n = 0, w = 0, ww = 0, q = 0, qq = 0, wq = 0;
};

struct ScoredFit {
  double scale = 0, shift = 0, error = 0;
};

/// Sum of squares of w - (scale * q - shift).
[[maybe_unused]] QUANTAL_HD double fit_error(const FitSums& s, double scale, double shift) {
  return s.ww - 2.0 * scale * s.wq + 2.0 * shift * s.w + scale * scale * s.qq -
         2.0 * scale * shift * s.q + s.n * shift * shift;
}

/// Least squares scale without a shift.
[[maybe_unused]] QUANTAL_HD ScoredFit best_symmetric(const FitSums& s) {
  const double scale = s.qq > 0 ? s.wq / s.qq : 0.0;
  return {scale, 0.0, fit_error(s, scale, 0.0)};
}

/// Least squares scale and shift, the shift kept at 0 or above.
[[maybe_unused]] QUANTAL_HD ScoredFit best_shifted(const FitSums& s) {
  const double determinant = s.n * s.qq - s.q * s.q;
  if (determinant > 0) {
    const double scale = (s.n * s.wq - s.w * s.q) / determinant;
    const double shift = (s.q * s.wq - s.qq * s.w) / determinant;
    if (shift >= 0) return {scale, shift, fit_error(s, scale, shift)};
  }
  return best_symmetric(s);
}

/// Step number `step` of the search, -1 .. 1.
[[maybe_unused]] QUANTAL_HD float fit_offset(int step) {
  return static_cast<float>(step - kFitSteps / 2) * kFitSpread;
}

}  // namespace
}  // namespace quantal

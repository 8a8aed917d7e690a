// Steps of the searches of kernels/block_quantize.h, and of those for super-blocks, that stand
// between two passes over a group: plain arithmetic on its sums, the same for every instruction set
// and on a device.
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

/// 1 / d, or 0 where that is no finite number.
[[maybe_unused]] QUANTAL_HD float finite_inverse(float d) {
  const float id = d != 0.0F ? 1.0F / d : 0.0F;
  return id - id == 0.0F ? id : 0.0F;
}

// ------------------------------------------------------------------ super-blocks

/// Step widths that IQ4_NL's search tries around each end of its table: -kTableSteps ..
/// kTableSteps.
inline constexpr int kTableSteps = 7;

inline constexpr int kSuperWeights = 256;  ///< of a super-block
inline constexpr int kMostSubScale = 63;   ///< of a 6-bit scale
inline constexpr int kNeighbours = 1;      ///< sub-scales tried on each side of the nearest one
inline constexpr int kSuperRounds = 2;     ///< times that the super-scales are fitted to the codes
/// Largest weight that a super-block of Q4_K can hold; the searches refuse larger ones.
inline constexpr float kLargestSearched = 65504.0F * 63.0F * 15.0F;

/// Least squares super-scale and super-offset for codes and sub-scales as they are: of w ~ d * a -
/// dmin * b with a = sub-scale * (code - centre) and b = sub-offset. b is 0 without offsets. The
/// sums of products with w are added in the order of the weights; the others are exact.
struct SuperFit {
  double aa = 0, ab = 0, bb = 0, wa = 0, wb = 0;

  QUANTAL_HD void add(double w, double a, double b) {
    aa += a * a;
    ab += a * b;
    bb += b * b;
    wa += w * a;
    wb += w * b;
  }
  QUANTAL_HD ShiftedFit solve() const {
    const double determinant = aa * bb - ab * ab;
    if (bb > 0 && determinant > 0) {
      return {static_cast<float>((wa * bb - wb * ab) / determinant),
              static_cast<float>((wa * ab - wb * aa) / determinant)};
    }
    return {aa > 0 ? static_cast<float>(wa / aa) : 0.0F, 0.0F};
  }
};

/// Step number `step` of the search, -1 .. 1.
[[maybe_unused]] QUANTAL_HD float fit_offset(int step) {
  return static_cast<float>(step - kFitSteps / 2) * kFitSpread;
}

}  // namespace
}  // namespace quantal

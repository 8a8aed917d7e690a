// Primitives that quantizers are made of: one pass over weights each, widened to float32 on the
// fly.
//
// One set per instruction set, all with identical results: sums run over 16 virtual lanes (element
// i of a run goes to lane i mod 16) in double and are combined as lane l += lane l + 8, 4, 2, 1;
// every other operation is elementwise with one rounding each, never contracted. Primitives know
// nothing of dialects; buffers must be valid, nothing is checked here and nothing throws.
#pragma once

#include <array>
#include <cstdint>

#include "quantal/core.h"

namespace quantal {

/// Weights as they lie in memory: `data` points to elements of kF32, kF16 or kBF16.
struct WeightRun {
  DType dtype = DType::kF32;
  const void* data = nullptr;

  /// The same run from element `i` on.
  WeightRun at(std::int64_t i) const {
    const auto size = static_cast<std::int64_t>(dtype == DType::kF32 ? 4 : 2);
    return {dtype, static_cast<const std::uint8_t*>(data) + i * size};
  }
};

/// Smallest and largest of a group (the first of equal ones, so -0 and +0 are told apart); `finite`
/// is false if a weight was NaN or infinite (then the other members mean nothing).
struct Range {
  float low = 0;
  float high = 0;
  bool finite = true;
};

/// A 16-entry quantizer: code = `codes[#{k : thresholds[k] < s}]`, so that a tie takes the lower
/// entry. 15 thresholds, ascending; the last element of the array is unused.
struct TableQuantizer {
  std::array<float, 16> thresholds{};
  std::array<std::uint8_t, 16> codes{};
};

/// Affine codes of a group: q = clamp(rint(w * scale + zero), 0, max_code), product and sum rounded
/// separately, rint half to even. `scale` is in codes per weight unit, `zero` in codes.
struct AffineCode {
  float scale = 1;
  float zero = 0;
  float max_code = 15;
};

/// Sums of one half-quadratic step over a group: of `q - (w - e) * scale` and of `|w - r|`.
struct SolverSums {
  double zero = 0;
  double error = 0;
};

/// Number of neighbouring column groups that one call of a `_columns` primitive handles at most.
inline constexpr std::int64_t kColumnBlock = 64;

/// One primitive per member. `n` elements per run (n >= 1). The `_columns` primitives treat `count`
/// (1 .. kColumnBlock) groups that lie side by side: member i of group j is element i * stride + j.
struct QuantizeKernels {
  const char* name;

  /// max |w|. NaN or +infinity if a weight is not finite.
  float (*absmax)(WeightRun w, std::int64_t n);

  /// codes[i] = table(clamp(w[i] * factor, -1, 1)); with `divide` table(clamp(w[i] / factor, -1,
  /// 1)).
  void (*encode_table)(const TableQuantizer& table, WeightRun w, std::int64_t n, float factor,
                       bool divide, std::uint8_t* codes);

  /// Range of a run, and of `count` columns into low[j], high[j] (returns false if not finite).
  Range (*range)(WeightRun w, std::int64_t n);
  bool (*range_columns)(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count,
                        float* low, float* high);

  /// One step of the half-quadratic solver with p = 0.7, beta = 10 (Badri and Shaji,
  /// "Half-Quadratic Quantization of Large Machine Learning Models", 2023; hqq 0.2.8):
  ///   q = affine code of w;  r = (q - zero) / scale;  d = w - r
  ///   e = sign(d) * max(|d| - 0.1 * |d|^-0.3, 0)
  /// float32, one rounding per operation; |d|^-0.3 within 0.51 ulp.
  SolverSums (*solver_step)(WeightRun w, std::int64_t n, AffineCode code);
  void (*solver_step_columns)(WeightRun w, std::int64_t n, std::int64_t stride, std::int64_t count,
                              const float* scale, const float* zero, float max_code,
                              SolverSums* sums);

  /// Affine codes of a run; of a run whose element j has its own scale[j] and zero[j].
  void (*encode_affine)(WeightRun w, std::int64_t n, AffineCode code, std::uint8_t* codes);
  void (*encode_affine_each)(WeightRun w, std::int64_t n, const float* scale, const float* zero,
                             float max_code, std::uint8_t* codes);

  /// out[i] = in[i] ^ -0.3f in float32 (the solver's power, for tests). 0 gives +infinity.
  void (*power)(const float* in, std::int64_t n, float* out);
};

/// The set of active_cpu_kernels().
const QuantizeKernels& quantize_kernels();

/// The obvious statement of the above (always available; the set named "scalar").
const QuantizeKernels& quantize_kernels_scalar();
const QuantizeKernels& quantize_kernels_avx2();
const QuantizeKernels& quantize_kernels_avx512();
const QuantizeKernels& quantize_kernels_neon();

}  // namespace quantal

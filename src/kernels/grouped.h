// Primitives of quantizers whose groups divide every row: one call takes a run of whole groups.
//
// One set per instruction set, all with identical results; every operation has one rounding and is
// never contracted. Primitives know nothing of dialects; buffers must be valid, nothing is checked
// here but for weights that are not finite, and nothing throws.
#pragma once

#include <cstdint>

#include "kernels/quantize.h"
#include "quantal/core.h"
#include "quantal/kernels.h"

namespace quantal {

/// Groups of affine codes of 1 .. 8 bits whose statistics are float32.
struct AnchoredRun {
  WeightRun weights;
  std::int64_t groups = 0;
  std::int64_t group_size = 0;  ///< a multiple of 16
  int bits = 4;
  float* scales = nullptr;        ///< [groups]
  float* biases = nullptr;        ///< [groups], weight units
  std::uint8_t* codes = nullptr;  ///< [groups * group_size], one per byte
};

/// Groups of small floats that share a scale of one byte.
struct MicroscaledRun {
  WeightRun weights;  ///< arithmetic is done in their type: each step is rounded to it
  std::int64_t groups = 0;
  std::int64_t group_size = 0;             ///< a multiple of 16
  CodeMap element = CodeMap::kE2M1;        ///< kE2M1 or kE4M3
  ScaleSource scale = ScaleSource::kE8M0;  ///< kE8M0 or kE4M3
  std::uint8_t* scales = nullptr;          ///< [groups]
  std::uint8_t* codes = nullptr;           ///< [groups * group_size], one per byte
};

/// One primitive per member.
struct GroupedKernels {
  const char* name;

  /// Affine codes anchored at the end of a group with the larger magnitude, so that this end and
  /// zero are on the grid. nb = 2^bits - 1; all in float32:
  ///   s = max((high - low) / nb, 1e-7);  edge = |low| > |high| ? low : high;  s = -s if edge is
  ///   high
  ///   q0 = rint(edge / s);  q0 != 0: scale = edge / q0, bias = edge;  else scale = s, bias = 0
  ///   code = clamp(rint((w - bias) / scale), 0, nb)
  /// One bit: scale = max(high - low, 1e-7), bias = low (of equal zeros the first), the same code.
  /// Returns false if a weight is not finite; the buffers mean nothing then.
  bool (*encode_anchored)(const AnchoredRun& run);

  /// Microscaled codes. With T the type of the weights, M = 6 (E2M1) or 448 (E4M3):
  ///   u = T(max |w| / M)
  ///   kE8M0: e = u == 0 ? 0 : ceil(log2 u), exact;  byte = (e + 127) mod 256,
  ///          v = T(w / T(2^e))
  ///   kE4M3: byte = E4M3(u), half to even, at most 448;  v = T(w / value of the byte)
  ///   E2M1 code = the value nearest to v, distances in float32, of equal ones the lowest code;
  ///          0 where v is NaN
  ///   E4M3 code = E4M3(v), half to even, magnitude at most 448
  /// Returns false if a weight is not finite; the buffers mean nothing then.
  bool (*encode_microscaled)(const MicroscaledRun& run);

  /// out[i] = dtype(in[i]), half to even, for finite and infinite numbers. dtype kF32, kF16 or
  /// kBF16.
  void (*narrow)(DType dtype, const float* in, std::int64_t n, void* out);
};

/// The set of active_cpu_kernels().
const GroupedKernels& grouped_kernels();

/// The obvious statement of the above (always available; the set named "scalar").
const GroupedKernels& grouped_kernels_scalar();
const GroupedKernels& grouped_kernels_avx2();
const GroupedKernels& grouped_kernels_avx512();
const GroupedKernels& grouped_kernels_neon();

}  // namespace quantal

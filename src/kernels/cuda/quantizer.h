// How weights become codes on a device, in the words of the primitives of kernels/quantize.h,
// grouped.h, rounded.h and row_int8.h. Which dialect uses which is known in formats/ only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/rounded.h"
#include "quantal/packed.h"

namespace quantal::cuda {

/// r() rounds to the value type.
enum class Encoder : int {
  /// scale = max |w|; code = table(clamp(w / max(scale, least), -1, 1)), the division as a product
  /// with 1 / max(..) but in a short last group, whose scale is max(scale, least).
  kTable = 0,
  /// scale = f16(max |w|) of a row; code = rint(f16(w) * ((1 / scale) * 127)) + 128.
  kRowInt8 = 1,
  /// GroupedKernels::encode_anchored of r(w).
  kAnchored = 2,
  /// Of r(w): scale = r(r(high - low) / max), shift = -low, code as RoundedKernels::encode. With
  /// rounds, shifts by RoundedKernels::shrink_step until the mean residual does not fall.
  kShifted = 3,
  /// The same with the shift as a rounded number of codes.
  kRoundedZero = 4,
  /// Of r(w): scale = r(max |w| / 127), code = rint(r(r(w) / scale)) + 128.
  kSymmetric = 5,
  /// The half-quadratic form: code = rint(clamp(w * scale + zero)), 1 / scale is stored.
  kAffine = 6,
  /// GroupedKernels::encode_microscaled of w as it is: 4 bits are E2M1, 8 bits E4M3.
  kMicroscaled = 7,
  // Groups of 32 whose scales are binary16; a weight whose scale is none is refused.
  kExtreme = 8,   ///< BlockQuantizeKernels::extreme32, the centre is that of the form
  kRange = 9,     ///< BlockQuantizeKernels::range32
  kLargest = 10,  ///< BlockQuantizeKernels::absmax32, codes with 128 added
  /// The scale of w ~ scale * values[code] by a search; code = table(clamp(w * (1 / scale / 127))).
  kFitTable = 11,
  /// Super-blocks of 256 by the searches of BlockQuantizeKernels and kernels/block_fit.h: 4 or 5
  /// bits with a shift in groups of 32, or 6 bits in groups of 16.
  kFitSuper = 12,
};
inline constexpr int kEncoders = 13;

/// Widths of the codes that an encoder makes.
QUANTAL_HD constexpr bool makes_width(Encoder encoder, int bits) {
  switch (encoder) {
    case Encoder::kTable:
      return bits == 4;
    case Encoder::kRowInt8:
    case Encoder::kSymmetric:
      return bits == 8;
    case Encoder::kMicroscaled:
      return bits == 4 || bits == 8;
    case Encoder::kExtreme:
    case Encoder::kRange:
      return bits == 4 || bits == 5;
    case Encoder::kLargest:
      return bits == 8;
    case Encoder::kFitTable:
      return bits == 4;
    case Encoder::kFitSuper:
      return bits == 4 || bits == 5 || bits == 6;
    default:
      return true;
  }
}

/// Encoders whose rounds optimize shifts.
constexpr bool optimizes_shifts(Encoder encoder) {
  return encoder == Encoder::kShifted || encoder == Encoder::kRoundedZero;
}

/// Encoders whose scales and offsets must be binary16 numbers.
QUANTAL_HD constexpr bool makes_halves(Encoder encoder) {
  return encoder == Encoder::kExtreme || encoder == Encoder::kRange ||
         encoder == Encoder::kLargest || encoder == Encoder::kFitTable;
}

/// Encoders of r(w): weights are rounded to the value type first.
constexpr bool rounds_weights(Encoder encoder) {
  return encoder == Encoder::kAnchored || encoder == Encoder::kShifted ||
         encoder == Encoder::kRoundedZero || encoder == Encoder::kSymmetric;
}

/// Rounds that a quantizer may ask for, and those that it may have a schedule for.
inline constexpr int kMaxRounds = 1000, kMaxShrinks = 32;
static_assert(kMaxShrinks == std::size(quantal_cuda_quantizer{}.no_shrink));

/// The settings that an encoder has; others are ignored.
struct Quantizer {
  Encoder encoder = Encoder::kTable;
  float thresholds[16] = {};    ///< kTable, kFitTable: as TableQuantizer
  std::uint8_t codes[16] = {};  ///< kTable, kFitTable
  float values[16] = {};        ///< kFitTable: of the thresholds' intervals, ascending
  float least = 0;              ///< kTable: least divisor
  float not_a_number = 0;       ///< kShifted, kRoundedZero: what NaN counts as
  float tiny_range = 0;         ///< kAffine: ranges up to it have scale 1
  float largest_scale = 0;      ///< kAffine
  bool round_zero = false;      ///< kAffine
  int rounds = 0;               ///< kAffine, kShifted, kRoundedZero: of the solver at most; 0: none
  float max_code = 0;           ///< kAffine: largest code; 0: that of the width
  float power = 0;  ///< kShifted, kRoundedZero with rounds: members of Shrink, those that
  float inverse_beta[kMaxShrinks] = {};  ///< change by round
  float no_shrink[kMaxShrinks] = {};
  float nested_map[256] = {};  ///< kNestedU8: ascending values of the second level's codes
};

/// The same as it crosses the interface of launch.h.
inline quantal_cuda_quantizer interface_form(const Quantizer& q) {
  quantal_cuda_quantizer out{};
  out.encoder = static_cast<std::int32_t>(q.encoder);
  std::ranges::copy(q.thresholds, out.thresholds);
  std::ranges::copy(q.codes, out.codes);
  std::ranges::copy(q.values, out.values);
  out.least = q.least;
  out.not_a_number = q.not_a_number;
  out.tiny_range = q.tiny_range;
  out.largest_scale = q.largest_scale;
  out.round_zero = q.round_zero ? 1 : 0;
  out.rounds = q.rounds;
  out.max_code = q.max_code;
  out.power = q.power;
  std::ranges::copy(q.inverse_beta, out.inverse_beta);
  std::ranges::copy(q.no_shrink, out.no_shrink);
  std::ranges::copy(q.nested_map, out.nested_map);
  return out;
}

/// Scratch of one quantization, in the caller's workspace.
struct QuantizeScratch {
  float *scale, *offset;  ///< [groups], what codes are made with
  double* terms;          ///< [groups], of a sum over the matrix
  double* rows;           ///< [rows], the same by row
  float *next, *kept;     ///< [groups], shifts of the next round and of the best one
  float* best;            ///< least mean residual so far, or the mean of the first level
  std::int32_t* done;     ///< 1 when the solver has stopped
  std::uint8_t* nested;   ///< [groups], codes of the first level
  float* absmax2;         ///< [groups / nested_group_size, rounded up]
};

/// Everything that the kernels of one quantization are given.
struct QuantizeArgs {
  Quantizer how;
  const void* weight;
  FloatKind kind;  ///< of weight
  bool converts;   ///< weights are rounded to the value type first
  std::int64_t rows, cols, group_size, groups;
  std::int64_t code_bytes, stat_bytes, slots, nested_slots, nested_group_size;
  int bits;
  float top;        ///< largest code
  float centre;     ///< of the form
  int round_index;  ///< of a solver, from 0
  Shrink shrink;    ///< of this round
  GroupKind group_map;
  ScaleKind scale_kind;
  FloatKind value_kind;
  bool has_header, has_offsets;
  std::uint8_t *codes, *stats, *shared;
  std::int32_t* refused;  ///< set to 1 if a weight is not finite
  QuantizeScratch scratch;
};

}  // namespace quantal::cuda

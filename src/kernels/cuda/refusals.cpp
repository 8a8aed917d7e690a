#include "kernels/cuda/refusals.h"

#include "kernels/cuda/matrix.h"
#include "kernels/layout.h"

namespace quantal::cuda {
namespace {

constexpr std::int64_t kMaxSmallInputs = 32;   // four operands of the tensor cores
constexpr std::int64_t kGranule = 8;           // 16-bit elements of a copy of 16 bytes
constexpr std::int64_t kMaxInt8Cols = 131072;  // sums of 127 * 128 stay below 2^31

std::string chunk_refusal(const PackedSpec& spec, DType dtype) {
  if (dtype != DType::kF16 && dtype != DType::kBF16) {
    return "activations are " + std::string(dtype_name(dtype)) + ", expected f16 or bf16";
  }
  if (spec.group_map != GroupMap::kRowRuns) {
    return "statistics are shared by rows, expected groups along rows";
  }
  if (whole_chunks(spec)) return {};
  return "in_features are " + std::to_string(spec.cols) + " in groups of " +
         std::to_string(spec.group_size) + ", expected multiples of 16";
}

}  // namespace

std::string small_refusal(const PackedSpec& spec, DType dtype, std::int64_t inputs) {
  if (inputs < 0 || inputs > kMaxSmallInputs) {
    return "rows of activations are " + std::to_string(inputs) + ", expected 0 .. " +
           std::to_string(kMaxSmallInputs);
  }
  return chunk_refusal(spec, dtype);
}

std::string tile_refusal(const PackedSpec& spec, DType dtype, bool transposed) {
  if (transposed && spec.rows % kGranule != 0) {
    return "out_features are " + std::to_string(spec.rows) + ", expected a multiple of " +
           std::to_string(kGranule);
  }
  return chunk_refusal(spec, dtype);
}

std::string int8_refusal(const PackedSpec& spec, float threshold) {
  const bool integer = spec.bits == 8 && spec.code_map == CodeMap::kInteger;
  if (!integer || spec.offset != Offset::kOver127 || spec.group_map != GroupMap::kRowRuns ||
      spec.group_size != spec.cols || scale_bytes(spec.scale) == 1) {
    return "weights are " + std::to_string(spec.bits) + " bits in groups of " +
           std::to_string(spec.group_size) +
           ", expected 8-bit integers over 127 with one scale per row of " +
           std::to_string(spec.cols);
  }
  if (spec.cols > kMaxInt8Cols) {
    return "in_features are " + std::to_string(spec.cols) + ", expected at most " +
           std::to_string(kMaxInt8Cols);
  }
  if (!(threshold >= 0.0F)) {
    return "threshold is " + std::to_string(threshold) + ", expected >= 0";
  }
  return {};
}

std::string quantize_refusal(const PackedSpec& spec, Encoder encoder) {
  const bool floats = spec.scale == ScaleSource::kF32 || spec.scale == ScaleSource::kF16 ||
                      spec.scale == ScaleSource::kBF16;
  const bool offsets = stores_offsets(spec.offset);
  const bool whole = spec.cols % spec.group_size == 0;
  bool legal = spec.group_map == GroupMap::kRowRuns && makes_width(encoder, spec.bits);
  switch (encoder) {
    case Encoder::kTable:
      legal = legal && !offsets &&
              (spec.scale == ScaleSource::kF32 || spec.scale == ScaleSource::kNestedU8);
      break;
    case Encoder::kRowInt8:
    case Encoder::kSymmetric:
      legal = legal && floats && !offsets && whole;
      break;
    case Encoder::kAnchored:
    case Encoder::kShifted:
    case Encoder::kRoundedZero:
      legal = legal && floats && offsets && whole;
      break;
    case Encoder::kAffine:
      legal = legal && floats && offsets && spec.rows * spec.cols % spec.group_size == 0;
      break;
    case Encoder::kMicroscaled:
      legal = legal && !offsets && whole &&
              (spec.scale == ScaleSource::kE8M0 || spec.scale == ScaleSource::kE4M3) &&
              spec.code_map == (spec.bits == 4 ? CodeMap::kE2M1 : CodeMap::kE4M3);
      break;
    default:
      return "encoder is number " + std::to_string(static_cast<int>(encoder)) + ", expected 0 .. " +
             std::to_string(kEncoders - 1);
  }
  if (legal) return {};
  return "a form of " + std::to_string(spec.bits) + " bits in groups of " +
         std::to_string(spec.group_size) + " is given, expected one that encoder " +
         std::to_string(static_cast<int>(encoder)) + " makes";
}

}  // namespace quantal::cuda

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

/// Whether rows are whole groups, or columns where they may be groups.
bool is_whole(const PackedSpec& spec, bool columns) {
  if (spec.group_map == GroupMap::kRowRuns) return spec.cols % spec.group_size == 0;
  return columns && spec.group_map == GroupMap::kColumnBlocks;
}

/// Groups of 32 with binary16 scales.
bool is_short(const PackedSpec& spec) {
  return is_whole(spec, false) && spec.group_size == 32 && spec.scale == ScaleSource::kF16;
}

/// Super-blocks of 256 that kFitSuper makes.
bool is_super(const PackedSpec& spec) {
  const bool six = spec.bits == 6;
  return spec.group_map == GroupMap::kRowRuns && spec.cols % 256 == 0 &&
         spec.group_size == (six ? 16 : 32) && spec.nested_group_size == 256 / spec.group_size &&
         spec.centre == (six ? 32 : 0) && spec.offset == (six ? Offset::kNone : Offset::kShift) &&
         spec.scale == (six ? ScaleSource::kSuperI8 : ScaleSource::kSuperU8);
}

/// `encoder` is one of the enumerators.
bool makes_form(const PackedSpec& spec, Encoder encoder) {
  const bool floats = spec.scale == ScaleSource::kF32 || spec.scale == ScaleSource::kF16 ||
                      spec.scale == ScaleSource::kBF16;
  const bool offsets = stores_offsets(spec.offset);
  const bool numbers = spec.code_map == CodeMap::kInteger;
  if (!makes_width(encoder, spec.bits)) return false;
  switch (encoder) {
    case Encoder::kTable:
      return !offsets && spec.group_map == GroupMap::kRowRuns &&
             (spec.scale == ScaleSource::kF32 || spec.scale == ScaleSource::kNestedU8);
    case Encoder::kRowInt8:
      return numbers && floats && !offsets && is_whole(spec, false);
    case Encoder::kSymmetric:
      return numbers && floats && !offsets && is_whole(spec, true);
    case Encoder::kAnchored:
      return numbers && floats && offsets && is_whole(spec, false);
    case Encoder::kShifted:
    case Encoder::kRoundedZero:
      return numbers && floats && offsets && is_whole(spec, true);
    case Encoder::kAffine:
      return numbers && floats && offsets && spec.group_map != GroupMap::kColumnBlocks &&
             spec.rows * spec.cols % spec.group_size == 0;
    case Encoder::kMicroscaled:
      return !offsets && is_whole(spec, false) &&
             (spec.scale == ScaleSource::kE8M0 || spec.scale == ScaleSource::kE4M3) &&
             spec.code_map == (spec.bits == 4 ? CodeMap::kE2M1 : CodeMap::kE4M3);
    case Encoder::kExtreme:
    case Encoder::kLargest:
      return numbers && is_short(spec) && !offsets && spec.centre == 1 << (spec.bits - 1);
    case Encoder::kRange:
      return numbers && is_short(spec) && spec.offset == Offset::kBias && spec.centre == 0;
    case Encoder::kFitTable:
      return spec.code_map == CodeMap::kIq4Nl && is_short(spec) && !offsets;
    case Encoder::kFitSuper:
      return numbers && is_super(spec);
  }
  return false;
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

std::string quantize_refusal(const PackedSpec& spec, const Quantizer& how) {
  const int number = static_cast<int>(how.encoder);
  if (number < 0 || number >= kEncoders) {
    return "encoder is number " + std::to_string(number) + ", expected 0 .. " +
           std::to_string(kEncoders - 1);
  }
  if (!makes_form(spec, how.encoder)) {
    return "a form of " + std::to_string(spec.bits) + " bits in groups of " +
           std::to_string(spec.group_size) + " is given, expected one that encoder " +
           std::to_string(number) + " makes";
  }
  const int most = optimizes_shifts(how.encoder) ? kMaxShrinks : kMaxRounds;
  if (how.rounds < 0 || how.rounds > most) {
    return "rounds are " + std::to_string(how.rounds) + ", expected 0 .. " + std::to_string(most);
  }
  const auto top = static_cast<float>((1 << spec.bits) - 1);
  if (!(how.max_code >= 0 && how.max_code <= top)) {
    return "max_code is " + std::to_string(how.max_code) + ", expected 0 .. " + std::to_string(top);
  }
  return {};
}

}  // namespace quantal::cuda

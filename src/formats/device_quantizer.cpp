#include "formats/device_quantizer.h"

#include <algorithm>
#include <limits>

#include "formats/bnb/bnb_params.h"
#include "formats/gguf/gguf_encode.h"
#include "formats/gguf/gguf_params.h"
#include "formats/hqq/hqq_params.h"
#include "formats/mlx/mlx_params.h"
#include "formats/quanto/quanto_codec.h"

namespace quantal {
namespace {

using cuda::Encoder;
using cuda::Quantizer;

std::optional<Quantizer> bnb_quantizer(const PackedSpec& spec) {
  Quantizer how;
  if (bnb::is_int8(spec)) {
    how.encoder = Encoder::kRowInt8;
    return how;
  }
  const TableQuantizer& table = bnb::table_quantizer(spec.code_map == CodeMap::kFp4);
  how.encoder = Encoder::kTable;
  std::ranges::copy(table.thresholds, how.thresholds);
  std::ranges::copy(table.codes, how.codes);
  std::ranges::copy(bnb::dynamic_map(), how.nested_map);
  how.least = bnb::kTinyAbsmax;
  return how;
}

std::optional<Quantizer> hqq_quantizer(const PackedSpec& spec) {
  const hqq::Flags flags = hqq::Flags::from_int(spec.dialect_flags);
  if (flags.quant_zero || flags.quant_scale) return std::nullopt;
  Quantizer how;
  how.encoder = Encoder::kAffine;
  how.tiny_range = hqq::kTinyRange;
  how.largest_scale = hqq::kMaxInverseScale;
  how.round_zero = flags.round_zero;
  how.rounds = flags.optimize ? hqq::kSolverRounds : 0;
  how.max_code = hqq::max_code_of(spec);
  return how;
}

std::optional<Quantizer> mlx_quantizer(const PackedSpec& spec) {
  Quantizer how;
  how.encoder = spec.code_map == CodeMap::kInteger ? Encoder::kAnchored : Encoder::kMicroscaled;
  return how;
}

std::optional<Quantizer> quanto_quantizer(const PackedSpec& spec) {
  const quanto::Flags flags = quanto::Flags::from_int(spec.dialect_flags);
  const bool one_scale = spec.rows * spec.cols <= spec.group_size;
  if ((flags.per_tensor && !one_scale) || spec.code_map != CodeMap::kInteger) return std::nullopt;
  Quantizer how;
  how.encoder = spec.offset == Offset::kNone ? Encoder::kSymmetric
                : flags.zero_point           ? Encoder::kRoundedZero
                                             : Encoder::kShifted;
  how.not_a_number = flags.zero_point ? std::numeric_limits<float>::lowest() : 0.0F;
  if (!flags.optimize) return how;
  how.rounds = quanto::kSolverRounds + 1;
  for (int round = 0; round < how.rounds; ++round) {
    const Shrink shrink = quanto::shrink_of(round, spec.value_dtype);
    how.power = shrink.power;
    how.inverse_beta[round] = shrink.inverse_beta;
    how.no_shrink[round] = shrink.no_shrink;
  }
  return how;
}

std::optional<Quantizer> gguf_quantizer(const PackedSpec& spec) {
  Quantizer how;
  switch (ggml_type_of(spec)) {
    case GgmlType::kQ4_0:
    case GgmlType::kQ5_0:
      how.encoder = Encoder::kExtreme;
      return how;
    case GgmlType::kQ4_1:
    case GgmlType::kQ5_1:
      how.encoder = Encoder::kRange;
      return how;
    case GgmlType::kQ8_0:
      how.encoder = Encoder::kLargest;
      return how;
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K:
    case GgmlType::kQ6_K:
      how.encoder = Encoder::kFitSuper;
      return how;
    case GgmlType::kIQ4_NL:
      how.encoder = Encoder::kFitTable;
      std::ranges::copy(gguf::iq4_nl_quantizer().thresholds, how.thresholds);
      std::ranges::copy(gguf::iq4_nl_quantizer().codes, how.codes);
      std::ranges::copy(kIq4NlCodebook, how.values);
      return how;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::optional<Quantizer> device_quantizer(const PackedSpec& spec) {
  switch (spec.dialect) {
    case bnb::kDialectId:
      return bnb_quantizer(spec);
    case hqq::kDialectId:
      return hqq_quantizer(spec);
    case mlx::kDialectId:
      return mlx_quantizer(spec);
    case quanto::kDialectId:
      return quanto_quantizer(spec);
    case gguf::kDialectId:
      return gguf_quantizer(spec);
    default:
      return std::nullopt;
  }
}

}  // namespace quantal

// quantal transcode: moving packed matrices between dialects without decoding them to weights and
// back where codes mean the same thing (formats room).
//
// Two dialects that share a code map differ only in how statistics are spelled: codes are copied
// (or complemented) and statistics rewritten. What survives is stated before anything is written.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"
#include "quantal/kernels.h"

namespace quantal {

/// What a conversion of one matrix preserves.
struct Preservation {
  bool codes = false;         ///< every code is copied one to one; false: quantized again
  bool statistics = false;    ///< scales and offsets are the same numbers
  double statistics_ulp = 0;  ///< else: bound in units in the last place of their new storage
  bool values = false;        ///< dequantized weights are equal ...
  DType values_dtype = DType::kF32;  ///< ... when both are rounded to this dtype; f32: as they are
  std::string note;                  ///< the rule in one sentence, for people

  bool lossless() const { return codes && statistics && values; }  ///< nothing is lost
};

/// Where to.
struct TranscodeTarget {
  const Dialect* dialect = nullptr;  ///< to be converted to
  /// bits 0, group_size 0, quant_type "" and mode "" follow the source (the nearest that the
  /// dialect has); a method that is not the dialect's, or not of this width, is replaced by the one
  /// that is. value_dtype and double_quant are always the caller's.
  QuantizeOptions options;
  /// True: Error{kUnsupported} instead of quantizing again where no lossless edge exists.
  bool lossless_only = false;
};

/// Statement about converting a matrix of this spec, without doing it. Statements hold for every
/// matrix of the spec unless note says "depends on the values"; then transcode states what became
/// of the matrix at hand. Throws Error{kConfig} if the target cannot hold such a matrix at all.
Preservation plan_transcode(const PackedSpec& from, const TranscodeTarget& to);

/// Form of the matrix that transcode makes of such a source. Throws as plan_transcode.
PackedSpec transcoded_spec(const PackedSpec& from, const TranscodeTarget& to);
/// Short name of a form: "gguf Q4_1", "mlx 4-bit, group 32, f32", "bnb nf4, block 64, nested,
/// bf16".
std::string describe_form(const PackedSpec& spec);
/// Options with which the dialect quantizes to this form; method NONE where no method of the public
/// API has it (GGUF, MLX in 3 bits). What only a solver knows (HQQ's `optimize`) has its default.
QuantizeOptions options_of(const PackedSpec& spec);

/// A converted layer.
struct Transcoded {
  PackedMatrix matrix;        ///< in the target's form
  Preservation kept;          ///< proven on this matrix
  double relative_error = 0;  ///< ||w' - w||_F / ||w||_F of dequantized values; 0 if values
};
/// Converts. Lossy conversions dequantize row panels and quantize again with the target's
/// quantizer. Same bytes for every executor and instruction set. Throws what plan_transcode throws;
/// Error{kUnsupported} under lossless_only, and for weights that the target's quantizer refuses.
Transcoded transcode(const PackedView& from, const TranscodeTarget& to, const Executor& executor);

/// One row of the generated table of docs/convert.md.
struct TranscodeEdge {
  std::string from;   ///< form: "gguf Q4_1"
  std::string to;     ///< form: "mlx affine 4-bit, group 32, f32"
  Preservation kept;  ///< what survives
};
/// Edges between the common forms of all dialects, in a fixed order.
std::vector<TranscodeEdge> transcode_edges();
/// The same as a Markdown table.
std::string transcode_edges_markdown();

}  // namespace quantal

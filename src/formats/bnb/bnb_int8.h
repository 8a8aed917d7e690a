// LLM.int8 of bitsandbytes: row-wise int8 weights, their tensors in a state dict.
#pragma once

#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal::bnb {

/// The packed form: 8 bits, centre 128, Offset::kOver127, one group per row, float32 scales. Values
/// are float32 whatever options.value_dtype says: upstream multiplies in float32 and the file names
/// no type. Throws Error{kConfig} unless options.bits is 8, Error{kShape} for sizes no kernel
/// takes.
PackedSpec make_int8_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// Dialect::quantize for such a spec. Weights are rounded to binary16; per row
///   SCB = max |w|,   q = rint(w * ((1 / SCB) * 127)),   0 for a row of zeros,
/// float32, one rounding per operation. Bit-exact with bitsandbytes 0.50.2 (portable
/// int8_vectorwise_quant). Also refuses, with row and column, weights beyond binary16 (65504).
void quantize_int8(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, const Executor& executor);

/// weight int8 [rows, cols], SCB float32 [rows], weight_format uint8 [] = 0 ("row").
std::vector<NamedTensor> export_int8(const PackedView& w, const std::string& prefix);
/// Inverse of export_int8. The historic formats col32, col_turing and col_ampere are refused by
/// name with Error{kUnsupported}. `threshold` is the layer's llm_int8_threshold.
StoredLayer open_int8(const std::string& prefix, const TensorLookup& lookup, float threshold);

}  // namespace quantal::bnb

// Encoders of ggml's block types.
#pragma once

#include "kernels/quantize.h"
#include "quantal/ggml.h"

namespace quantal::gguf {

/// Rows [first_row, first_row + rows) of a matrix whose row 0 is at `weights`, as encode_ggml.
/// Errors name rows of the whole matrix.
void encode_rows(GgmlType type, WeightRun weights, std::int64_t first_row, std::int64_t rows,
                 std::int64_t cols, std::uint8_t* out, const Executor& executor);

/// Why a row could not be encoded.
enum class EncodeStatus { kDone, kNotFinite, kTooLarge };

/// `n` weights (whole blocks of one row) of one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
EncodeStatus encode_blocks32(GgmlType type, WeightRun weights, std::int64_t n, std::uint8_t* out);
/// The same for Q4_K, Q5_K and Q6_K, and for IQ4_NL.
EncodeStatus encode_blocks256(GgmlType type, WeightRun weights, std::int64_t n, std::uint8_t* out);
EncodeStatus encode_iq4_nl(WeightRun weights, std::int64_t n, std::uint8_t* out);

/// IQ4_NL's table divided by its largest magnitude, as thresholds half-way between neighbours.
const TableQuantizer& iq4_nl_quantizer();

}  // namespace quantal::gguf

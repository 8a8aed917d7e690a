// Encoders of ggml's block types.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/quantize.h"
#include "quantal/ggml.h"

namespace quantal::gguf {

/// The rows of a matrix as blocks, as encode_ggml. Threads share one object.
class RowEncoder {
 public:
  RowEncoder(GgmlType type, WeightRun weights, std::int64_t rows, std::int64_t cols);

  /// Blocks of rows [begin, end), one after another. False once a row at or before them failed.
  bool encode(std::int64_t begin, std::int64_t end, std::uint8_t* out);
  /// Throws Error{kUnsupported} that names the first weight of the matrix for which encode failed,
  /// however its rows were split.
  void check() const;

 private:
  const GgmlType type_;
  const WeightRun weights_;
  const std::int64_t rows_, cols_, row_bytes_;
  std::atomic<std::int64_t> failed_;  ///< first such row; rows_ if there is none
};

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

// quantal ggml: the blocks of GGUF tensors (formats room); their container is in quantal/io.h.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/kernels.h"

namespace quantal {

/// Element types of GGUF tensors (numbers of the file format).
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kF64 = 28,
  kBF16 = 30,
};

/// Size of a block in elements and bytes.
struct GgmlBlock {
  GgmlType type;
  std::string_view name;      ///< "Q4_1"
  std::int64_t elements = 1;  ///< per block
  std::int64_t bytes = 1;     ///< per block
  bool decodable = false;     ///< decode_ggml handles it
};
/// nullptr for a number that is not in the table.
const GgmlBlock* find_ggml_block(std::uint32_t type) noexcept;

/// Decodes `n` elements (a multiple of the block size) to float32, every product and sum rounded
/// separately as ggml's reference does. `data` holds n / elements * bytes bytes.
void decode_ggml(GgmlType type, const std::uint8_t* data, std::int64_t n, float* out);

/// Encodes rows of `cols` weights (cols a multiple of the block size). F32, F16 and BF16 convert;
/// Q4_0 to Q8_0 have the bits of ggml's reference; Q4_K and Q6_K are searched encodings whose
/// squared error is at most 1.02 times ggml's. Throws Error{kUnsupported} for other types and, with
/// row and column, for weights that are not finite. `out` holds rows * cols / elements * bytes.
void encode_ggml(GgmlType type, DType dtype, const void* weights, std::int64_t rows,
                 std::int64_t cols, std::uint8_t* out, const Executor& executor);

/// Blocks to the packed form and back, without changing any: pack and unpack are inverse. Float
/// types have no packed form. `where` names the tensor in errors.
bool ggml_packable(GgmlType type) noexcept;
PackedSpec ggml_spec(GgmlType type, std::int64_t rows, std::int64_t cols);
PackedMatrix pack_ggml(GgmlType type, std::int64_t rows, std::int64_t cols,
                       std::span<const std::uint8_t> blocks, const Executor& executor);
/// Throws Error{kUnsupported} if `w` is not of the gguf dialect.
std::vector<std::uint8_t> unpack_ggml(const PackedView& w, const Executor& executor);
GgmlType ggml_type_of(const PackedSpec& spec);

}  // namespace quantal

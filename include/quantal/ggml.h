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
  GgmlType type;              ///< of the elements
  std::string_view name;      ///< "Q4_1"
  std::int64_t elements = 1;  ///< per block
  std::int64_t bytes = 1;     ///< per block
  bool decodable = false;     ///< decode_ggml handles it
};
/// nullptr for a number that is not in the table.
const GgmlBlock* find_ggml_block(std::uint32_t type) noexcept;
/// By name in any case ("q4_k"); nullptr for an unknown one.
const GgmlBlock* find_ggml_block(std::string_view name) noexcept;
/// The entry of a type of the enumeration.
const GgmlBlock& ggml_block(GgmlType type);
/// Bytes of a tensor or part of one. Throws Error{kShape} unless cols is a multiple of the block.
std::int64_t ggml_bytes(GgmlType type, std::int64_t rows, std::int64_t cols);
/// `wanted` if rows of `cols` weights can be stored in it, else what llama.cpp's own quantizer
/// takes instead: Q4_K -> Q5_0, Q5_K -> Q5_1, Q6_K -> Q8_0, Q2_K, Q3_K -> IQ4_NL; F16 for rows that
/// are no multiple of 32.
GgmlType ggml_type_for(GgmlType wanted, std::int64_t cols);

/// Decodes `n` elements (a multiple of the block size) to float32, every product and sum rounded
/// separately as ggml's reference does. `data` holds n / elements * bytes bytes.
void decode_ggml(GgmlType type, const std::uint8_t* data, std::int64_t n, float* out);

/// True for the types that encode_ggml writes.
bool ggml_encodable(GgmlType type) noexcept;
/// Encodes rows of `cols` weights (cols a multiple of the block size). F32, F16 and BF16 convert,
/// half to even; Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 have the bits of ggml's C reference; Q4_K, Q5_K, Q6_K
/// and IQ4_NL are own searches for small squared errors (docs/formats/gguf.md). Same bytes for any
/// number of threads and instruction set. Throws Error{kUnsupported} for other types and, with row
/// and column, for weights that are not finite or whose scale no binary16 can hold; Error{kDtype},
/// Error{kShape}. `out` holds ggml_bytes(type, rows, cols).
void encode_ggml(GgmlType type, DType dtype, const void* weights, std::int64_t rows,
                 std::int64_t cols, std::uint8_t* out, const Executor& executor);

/// Whether blocks of this type have a packed form; float types have none.
bool ggml_packable(GgmlType type) noexcept;
/// The packed form of blocks of this type. Throws Error{kUnsupported} for types without one,
/// Error{kShape} for a wrong number of columns.
PackedSpec ggml_spec(GgmlType type, std::int64_t rows, std::int64_t cols);
/// Blocks to the packed form without changing any: unpack_ggml is the inverse. Values are those of
/// decode_ggml, bit for bit, in float32. Throws what ggml_spec throws, Error{kShape} for a wrong
/// number of bytes.
PackedMatrix pack_ggml(GgmlType type, std::int64_t rows, std::int64_t cols,
                       std::span<const std::uint8_t> blocks, const Executor& executor);
/// Throws Error{kUnsupported} if `w` is not of the gguf dialect, Error{kCorrupt} for a sub-scale
/// that has no place in the block.
std::vector<std::uint8_t> unpack_ggml(const PackedView& w, const Executor& executor);
/// Type of a packed matrix of the gguf dialect; Error{kUnsupported} for another dialect's.
GgmlType ggml_type_of(const PackedSpec& spec);

}  // namespace quantal

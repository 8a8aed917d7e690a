// HQQ: how W_q holds codes.
//
// The grouped matrix [R, C] is cut into `parts` blocks of whole rows; word (i, j) of W_q holds
// element (i, j) of every block, the first block in the highest bits:
//
//   bits     packing   word   parts  shift of part k   rows
//   8, 6, 5  8bit_u8   u8     1      0                 R
//   4        4bit_u8   u8     2      4 - 4k            R / 2
//   2        2bit_u8   u8     4      6 - 2k            R / 4
//   1        1bit_u8   u8     8      7 - k             R / 8
//   3        3bit_32   i32    10     27 - 3k           ceil(R / 10), missing rows are zero
//
// A part is a contiguous range of the flattened matrix.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "formats/hqq/hqq_params.h"

namespace quantal::hqq {

/// One row of the table above for a grouped matrix.
struct Packing {
  std::string_view name;
  DType word = DType::kU8;
  int bits = 8;
  int parts = 1;
  std::int64_t rows = 0;  ///< of W_q
  std::int64_t cols = 0;

  std::int64_t words() const { return rows * cols; }
  std::int64_t bytes() const { return words() * static_cast<std::int64_t>(dtype_size(word)); }
  int shift(std::int64_t part) const { return (parts - 1 - static_cast<int>(part)) * bits; }
};
/// Name of the packing of a width: "4bit_u8".
std::string_view packing_name(int bits);
/// Throws Error{kShape} if byte packing does not divide the rows (upstream drops or repeats rows
/// then, and cannot read its own result). `where` begins the message.
Packing packing_of(int bits, const Grouping& grouping, std::string_view where);

/// Bytes of W_q from the codes of `w`.
std::vector<std::uint8_t> pack_codes(const PackedView& w, const Packing& packing);
/// Inverse for some rows of a matrix, into `out` [rows.size(), code_bytes]. Throws Error{kCorrupt}
/// naming `tensor` for a code that needs more bits than the layer declares.
void unpack_codes(std::span<const std::uint8_t> words, const Packing& packing,
                  const std::string& tensor, const PackedSpec& spec, RowRange rows,
                  std::uint8_t* out);

/// What 3-bit words hold beyond codes (two top bits and missing rows), as a tensor like W_q with
/// everything else zero; empty if all of it is zero, as upstream's packer writes.
std::vector<std::uint8_t> stray_bits(std::span<const std::uint8_t> words, const Packing& packing,
                                     std::int64_t numel);

/// Codes of a layer without packing (`packing` None): one number of `dtype` each.
std::vector<std::uint8_t> codes_as_numbers(const PackedView& w, DType dtype);
/// Inverse for some rows. Throws Error{kCorrupt} naming `tensor` for a number that is no code.
void codes_from_numbers(const TensorView& numbers, const std::string& tensor,
                        const PackedSpec& spec, RowRange rows, std::uint8_t* out);

}  // namespace quantal::hqq

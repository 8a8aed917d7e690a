// Quanto: where upstream keeps each code, and what its bytes hold beyond codes.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/quanto/quanto_params.h"

namespace quantal::quanto {

/// Bytes of `_data._data` (2 and 4 bits), [packed_rows, cols] of grouped_of(spec): byte (i, j)
/// holds the grouped codes (i + k * packed_rows, j) at bit bits * k. `pad` are codes of the rows
/// beyond the last one (row-major), all 0 if empty.
std::vector<std::uint8_t> pack_codes(const PackedView& w, std::span<const std::uint8_t> pad);
/// Inverse for some rows of a matrix, into `out` [rows.size(), code_bytes].
void unpack_codes(std::span<const std::uint8_t> packed, const PackedSpec& spec, RowRange rows,
                  std::uint8_t* out);
/// Whether the packed rows hold more codes than the weight.
bool has_pad(const PackedSpec& spec);
/// These codes, empty if all are 0.
std::vector<std::uint8_t> pad_codes(std::span<const std::uint8_t> packed, const PackedSpec& spec);

/// One number per group in upstream's order: as the packed statistics for rows, column c * blocks +
/// b for statistic (b, c) of axis -1.
struct GroupNumbers {
  std::vector<std::uint8_t> scales, offsets;  ///< raw elements of value_dtype
};
GroupNumbers read_numbers(const PackedView& w);
/// Numbers of upstream's order at places of a file.
struct StoredNumbers {
  std::span<const std::uint8_t> scales{};
  std::span<const std::uint8_t> offsets{};  ///< empty for symmetric types
  bool one = false;                         ///< one number for all groups
  bool codes = false;                       ///< offsets are uint8, in codes
};
/// Rows of the statistics of a packed matrix into `out` [rows.size(), stat_bytes].
void write_numbers(const StoredNumbers& numbers, const PackedSpec& spec, RowRange rows,
                   std::uint8_t* out);

/// What the bytes at the end of PackedMatrix::shared keep for the writer; absent parts are what it
/// writes anyway.
struct Residue {
  std::optional<Tensor> input_scale, output_scale;  ///< other than 1.0
  std::vector<std::uint8_t> pad;                    ///< codes of pad rows that are not zero
  std::vector<std::uint8_t> zero_scale_codes;       ///< float8 codes of weights whose scale is 0

  std::vector<std::uint8_t> encode() const;
  /// Throws Error{kCorrupt} naming what does not fit.
  static Residue decode(std::span<const std::uint8_t> bytes);
};
std::span<const std::uint8_t> residue_of(const PackedView& w);

/// The value 1 as upstream stores an unused activation scale: 0-dim, of `dtype`.
Tensor unit_scale(DType dtype);

}  // namespace quantal::quanto

// Helpers that the dialects share for reading and writing a layer's tensors.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/quantize.h"
#include "quantal/core.h"
#include "quantal/formats.h"

namespace quantal {

/// The tensor `name`; throws Error{kCorrupt} "<where>: tensor <name> is missing".
const TensorView& require_tensor(const TensorLookup& lookup, const std::string& name,
                                 std::string_view where);

/// Throws Error{kDtype} naming the tensor unless its dtype is one of `allowed`, and Error{kCorrupt}
/// if its bytes do not match its shape.
void require_dtype(const TensorView& tensor, const std::string& name, std::string_view where,
                   std::span<const DType> allowed);

/// Throws Error{kShape} naming the tensor unless it has `expected` elements.
void require_numel(const TensorView& tensor, const std::string& name, std::string_view where,
                   std::int64_t expected);

/// A tensor of raw bytes.
Tensor tensor_of(DType dtype, std::vector<std::int64_t> shape, std::span<const std::uint8_t> bytes);
/// A one-dimensional uint8 tensor of the characters of `text`.
Tensor tensor_of_text(std::string_view text);
/// Characters of a one-dimensional uint8 tensor.
std::string text_of(const TensorView& tensor);

/// Shortest decimal that reads back as `value`, spelled as Python's repr does ("0.5", "1e-05").
std::string python_repr(double value);

/// Scale storage of a value type (kF32 -> kF32 ...), and back. kNestedU8 has none: kU8.
ScaleSource scale_source_of(DType dtype);
DType scale_dtype(ScaleSource source);

/// Throws Error{kUnsupported} "<where>: weight at row r, column c is nan, expected finite numbers"
/// for the first weight that is not finite; returns if all are.
void refuse_not_finite(std::string_view where, WeightRun weights, std::int64_t rows,
                       std::int64_t cols);

/// Rows per task that make a task about 32768 elements.
std::int64_t rows_per_task(std::int64_t cols);

/// Sums by row, of values that belong to groups of `step` elements of a [rows, cols] matrix, in
/// double: value i counts for the row that element i * step lies in. In order of i, so that the
/// sums depend on nothing but the values of the row.
std::vector<double> sums_by_row(std::span<const float> values, std::int64_t step, std::int64_t rows,
                                std::int64_t cols, const Executor& executor);
std::vector<double> sums_by_row(std::span<const double> values, std::int64_t step,
                                std::int64_t rows, std::int64_t cols, const Executor& executor);

/// out[2 i] = first[i], out[2 i + 1] = second[i]: `n` pairs of elements of `item` bytes (2 or 4).
void interleave(std::size_t item, std::int64_t n, const std::uint8_t* first,
                const std::uint8_t* second, std::uint8_t* out, const Executor& executor);

/// Packs rows of codes into `out` [rows.size(), code_bytes]; `fill(r, codes)` writes those of row
/// r, one byte each.
template <class Fill>
void pack_rows(const PackedSpec& spec, RowRange rows, std::uint8_t* out, Fill fill) {
  const std::int64_t code_bytes = layout_of(spec).code_bytes;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += code_bytes) {
    fill(r, codes.data());
    pack_row(spec.bits, codes.data(), spec.cols, out);
  }
}

/// spread_stats for some rows of the matrix that `flat` describes.
void spread_rows(PackedSpec spec, const FlatStats& flat, RowRange rows, std::uint8_t* stats,
                 const Executor& executor = serial_executor());

/// "8, 16, 32"
std::string join_numbers(std::span<const std::int64_t> numbers);

}  // namespace quantal

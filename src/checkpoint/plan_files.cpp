// Bytes of a layer in a file.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/plan_parts.h"

namespace quantal::checkpoint {
namespace {

/// Rows after which bytes grow by the same amount again: groups, nested groups and whatever packs
/// up to 32 rows (10 at 3 bits) come out even. 0 if no such number is much smaller than the matrix.
std::int64_t period_of(const PackedSpec& spec) {
  constexpr std::int64_t kPackedRows = 256;
  std::int64_t period = spec.bits == 3 ? 5 * kPackedRows : kPackedRows;
  while (period * spec.cols % (spec.group_size * spec.nested_group_size) != 0) {
    period *= 2;
    if (period > spec.rows) return 0;
  }
  return period * 4 <= spec.rows ? period : 0;
}

/// The tensors of a layer whose codes and statistics are zero.
std::vector<NamedTensor> exported(const PackedSpec& spec) {
  PackedMatrix matrix = make_packed(spec);
  if (spec.group_map == GroupMap::kRowRuns && layout_of(spec).has_header) {
    constexpr std::int64_t kMostBytes = 4;  // of a scale
    const auto groups = static_cast<std::size_t>(
        ceil_div(checked_mul(spec.rows, spec.cols, "plan: weights of a layer"), spec.group_size));
    const std::vector<std::uint8_t> zeros(groups * kMostBytes);
    const std::vector<float> nested(groups);
    const std::vector<std::uint16_t> supers(groups);
    spread_stats(spec, {zeros.data(), zeros.data(), nested.data(), supers.data(), supers.data()}, 0,
                 matrix.stats.data(), serial_executor());
  }
  std::vector<NamedTensor> out = dialect_by_id(spec.dialect).export_layer(matrix.view(), "");
  std::erase_if(out, [](const NamedTensor& one) { return one.kind == StateKind::kNone; });
  return out;
}

std::int64_t bytes_of(const NamedTensor& tensor) { return std::ssize(tensor.tensor.bytes); }

std::int64_t bytes_of(const std::vector<NamedTensor>& tensors) {
  std::int64_t sum = 0;
  for (const NamedTensor& tensor : tensors) sum += bytes_of(tensor);
  return sum;
}

/// Settings as text, such as bitsandbytes' quant_state: its length follows the digits of the shape.
bool is_text(const NamedTensor& tensor) {
  const auto& bytes = tensor.tensor.bytes;
  return tensor.tensor.dtype == DType::kU8 && bytes.size() > 1 && bytes.front() == '{' &&
         bytes.back() == '}';
}

std::int64_t text_bytes(const NamedTensor& tensor, std::int64_t its_rows, std::int64_t rows) {
  const auto& bytes = tensor.tensor.bytes;
  const std::string text(bytes.begin(), bytes.end());
  const std::string was = std::to_string(its_rows), is = std::to_string(rows);
  const bool names_rows = text.find(was) != std::string::npos;
  return std::ssize(text) + (names_rows ? std::ssize(is) - std::ssize(was) : 0);
}

PackedSpec with_rows(PackedSpec spec, std::int64_t rows) {
  spec.rows = rows;
  return spec;
}

/// Column maps tie the group to the number of rows; they are exported as they are.
bool grows_by_rows(const PackedSpec& spec) {
  return spec.group_map == GroupMap::kRowRuns && spec.group_size <= spec.cols;
}

}  // namespace

std::int64_t FileBytes::of(const PackedSpec& spec) {
  const auto key = spec_to_ints(spec);
  const auto found = known_.find(key);
  if (found != known_.end()) return found->second;
  std::int64_t bytes = 0;
  const std::int64_t period = grows_by_rows(spec) ? period_of(spec) : 0;
  if (period == 0) {
    bytes = bytes_of(exported(spec));
  } else {
    const std::int64_t first = period + spec.rows % period;
    const std::vector<NamedTensor> one = exported(with_rows(spec, first));
    const std::vector<NamedTensor> two = exported(with_rows(spec, first + period));
    const std::int64_t more = spec.rows / period - 1;
    for (std::size_t i = 0; i < one.size(); ++i) {
      const std::int64_t growth = bytes_of(two[i]) - bytes_of(one[i]);
      bytes += is_text(one[i])
                   ? text_bytes(one[i], first, spec.rows)
                   : checked_add(bytes_of(one[i]), checked_mul(growth, more, "plan: file bytes"),
                                 "plan: file bytes");
    }
  }
  known_.emplace(key, bytes);
  return bytes;
}

}  // namespace quantal::checkpoint

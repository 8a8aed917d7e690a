// Bytes of a layer in a file.
#include <algorithm>
#include <optional>

#include "checkpoint/plan_parts.h"

namespace quantal::checkpoint {
namespace {

/// Rows after which bytes grow by the same amount again: groups, nested groups and whatever packs
/// up to 32 rows come out even. 0 if no such number is much smaller than the matrix.
std::int64_t period_of(const PackedSpec& spec) {
  constexpr std::int64_t kPackedRows = 256;
  std::int64_t period = kPackedRows;
  while (period * spec.cols % (spec.group_size * spec.nested_group_size) != 0) {
    period *= 2;
    if (period > spec.rows) return 0;
  }
  return period * 4 <= spec.rows ? period : 0;
}

/// Bytes of the tensors of a zero-filled layer.
std::int64_t exported_bytes(const PackedSpec& spec) {
  const PackedMatrix matrix = make_packed(spec);
  const Dialect& dialect = dialect_by_id(spec.dialect);
  std::int64_t bytes = 0;
  for (const NamedTensor& one : dialect.export_layer(matrix.view(), "")) {
    if (one.kind != StateKind::kNone) bytes += std::ssize(one.tensor.bytes);
  }
  return bytes;
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
    bytes = exported_bytes(spec);
  } else {
    const std::int64_t rest = spec.rows % period;
    const std::int64_t one = exported_bytes(with_rows(spec, period + rest));
    const std::int64_t two = exported_bytes(with_rows(spec, 2 * period + rest));
    bytes = checked_add(one, checked_mul(two - one, spec.rows / period - 1, "plan: file bytes"),
                        "plan: file bytes");
  }
  known_.emplace(key, bytes);
  return bytes;
}

}  // namespace quantal::checkpoint

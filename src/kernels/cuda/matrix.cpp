#include "kernels/cuda/matrix.h"

#include <algorithm>
#include <string>

#include "kernels/layout.h"

namespace quantal::cuda {
namespace {

void check_alignment(const char* what, const void* p, std::uintptr_t alignment) {
  const auto rest = reinterpret_cast<std::uintptr_t>(p) % alignment;
  if (rest == 0) return;
  fail(Errc::kUnsupported, std::string("cuda: ") + what + " begin " + std::to_string(rest) +
                               " bytes behind a multiple of " + std::to_string(alignment) +
                               ", expected a multiple");
}

Values values_of(CodeMap map) {
  switch (map) {
    case CodeMap::kInteger:
      return Values::kNumber;
    case CodeMap::kE4M3:
      return Values::kE4M3;
    case CodeMap::kE5M2:
      return Values::kE5M2;
    default:
      return Values::kTable;
  }
}

}  // namespace

Divider divider_of(std::int64_t divisor) {
  Divider d;
  d.divisor = static_cast<std::uint32_t>(divisor);
  while ((std::int64_t{1} << d.shift) < divisor) ++d.shift;
  const std::uint64_t excess = (std::uint64_t{1} << d.shift) - static_cast<std::uint64_t>(divisor);
  d.multiplier =
      static_cast<std::uint32_t>((excess << 32) / static_cast<std::uint64_t>(divisor)) + 1;
  return d;
}

Matrix matrix_of(const PackedView& w) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  if (spec.cols + spec.group_size > kMaxPositions) {
    fail(Errc::kUnsupported, "cuda: columns and group_size are " +
                                 std::to_string(spec.cols + spec.group_size) +
                                 " together, expected at most " + std::to_string(kMaxPositions));
  }
  check_alignment("codes", w.codes.data(), 16);
  check_alignment("stats", w.stats.data(), 4);
  check_alignment("shared", w.shared.data(), 4);
  Matrix m;
  m.codes = w.codes.data();
  m.stats = w.stats.data();
  m.rows = spec.rows;
  m.cols = spec.cols;
  m.code_bytes = layout.code_bytes;
  m.stat_bytes = layout.stat_bytes;
  m.column_stats = spec.group_map == GroupMap::kColumnRuns ? layout.stat_rows : 0;
  m.slots = static_cast<std::uint32_t>(layout.slots);
  m.nested_slots = static_cast<std::uint32_t>(layout.nested_slots);
  m.group = divider_of(spec.group_size);
  m.nested_group = divider_of(spec.nested_group_size);
  if (layout.has_header) {
    m.last_phase = static_cast<std::uint32_t>(layout.slots * spec.group_size - spec.cols);
    m.last_nested = static_cast<std::uint32_t>(
        std::max<std::int64_t>(layout.nested_slots * spec.nested_group_size - layout.slots, 0));
  }
  m.bits = spec.bits;
  m.values = values_of(spec.code_map);
  m.groups = static_cast<GroupKind>(spec.group_map);
  m.offset = static_cast<OffsetKind>(spec.offset);
  m.scale = static_cast<ScaleKind>(spec.scale);
  m.value_kind = static_cast<FloatKind>(spec.value_dtype);
  m.has_header = layout.has_header;
  m.has_offsets = stores_offsets(spec.offset);
  m.centre = static_cast<float>(spec.centre);
  if (const auto* table = fixed_table(spec.code_map)) std::ranges::copy(*table, m.fixed);
  const auto* shared = reinterpret_cast<const float*>(w.shared.data());
  if (spec.code_map == CodeMap::kTable) m.table = shared;
  if (spec.scale == ScaleSource::kNestedU8) m.nested = shared + (m.table != nullptr ? 16 : 0);
  return m;
}

bool whole_chunks(const PackedSpec& spec) noexcept {
  constexpr std::int64_t kChunk = 16;
  return spec.group_map == GroupMap::kRowRuns && spec.cols % kChunk == 0 &&
         spec.group_size % kChunk == 0;
}

}  // namespace quantal::cuda

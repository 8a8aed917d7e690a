// Moving statistics between a dialect's flat arrays and the rows of a packed matrix.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/layout.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

/// Where one row's groups lie in the flat arrays, and where their bytes lie in the row.
struct RowGroups {
  std::int64_t phase;         // flat index of the row's first element mod group_size
  std::int64_t first;         // flat index of the row's first group
  std::int64_t count;         // groups that the row touches
  std::int64_t nested_phase;  // first mod nested_group_size
  std::int64_t nested_first;  // flat index of the first second-level block
  std::int64_t nested_count;  // second-level blocks that the row touches
};

RowGroups row_groups(const PackedSpec& spec, std::int64_t row) {
  const std::int64_t start = row * spec.cols;
  RowGroups g{};
  g.phase = start % spec.group_size;
  g.first = start / spec.group_size;
  g.count = ceil_div(g.phase + spec.cols, spec.group_size);
  if (!is_plain(spec.scale)) {  // supers: rows hold whole ones, so the phase is 0
    g.nested_phase = g.first % spec.nested_group_size;
    g.nested_first = g.first / spec.nested_group_size;
    g.nested_count = ceil_div(g.nested_phase + g.count, spec.nested_group_size);
  }
  return g;
}

std::uint32_t header_of(const RowGroups& g) {
  return static_cast<std::uint32_t>(g.phase) | (static_cast<std::uint32_t>(g.nested_phase) << 24);
}

void require_row_runs(const PackedSpec& spec, const char* where) {
  if (spec.group_map == GroupMap::kRowRuns) return;
  fail(Errc::kUnsupported, std::string(where) +
                               ": group_map is not row runs, expected row runs (the others store "
                               "flat statistics as they are)");
}

void copy_bytes(std::uint8_t* to, const void* from, std::int64_t bytes) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

/// Copies `count` elements to flat[first...]; those below `known` were written by an earlier row
/// and must be equal. Returns the new number of known elements.
std::int64_t merge(const std::uint8_t* slots, std::int64_t first, std::int64_t count,
                   std::int64_t bytes, std::int64_t known, std::uint8_t* flat, std::int64_t row,
                   const char* what) {
  for (std::int64_t k = 0; k < count && first + k < known; ++k) {
    if (std::memcmp(flat + (first + k) * bytes, slots + k * bytes,
                    static_cast<std::size_t>(bytes)) != 0) {
      fail(Errc::kCorrupt, std::string("packed statistics: ") + what + " of group " +
                               std::to_string(first + k) + " in row " + std::to_string(row) +
                               " differs from the row before, expected the same bytes");
    }
  }
  const std::int64_t skip = std::min(count, std::max<std::int64_t>(known - first, 0));
  copy_bytes(flat + (first + skip) * bytes, slots + skip * bytes, (count - skip) * bytes);
  return std::max(known, first + count);
}

/// Where each part of a row's statistics begins, in bytes; absent parts are empty.
struct RowParts {
  std::int64_t scales, offsets, nested, nested_offsets;
};
RowParts row_parts(const PackedSpec& spec, const PackedLayout& layout) {
  const std::int64_t bytes = scale_bytes(spec.scale);
  RowParts p{};
  p.scales = layout.has_header ? 4 : 0;
  p.offsets = p.scales + layout.slots * bytes;
  p.nested = p.offsets + (has_offset_slots(spec) ? layout.slots * bytes : 0);
  p.nested_offsets = p.nested + layout.nested_slots * 2;  // supers only
  return p;
}

void require_arrays(const PackedSpec& spec, const FlatStats& flat) {
  const bool super = is_super(spec.scale);
  if (flat.scales != nullptr && (!has_offset_slots(spec) || flat.offsets != nullptr) &&
      (spec.scale != ScaleSource::kNestedU8 || flat.absmax2 != nullptr) &&
      (!super || flat.supers != nullptr) &&
      (!super || !stores_offsets(spec.offset) || flat.super_offsets != nullptr)) {
    return;
  }
  fail(Errc::kConfig, "spread_stats: a flat array is null, expected all that the spec names");
}

void check_header(const std::uint8_t* stats, const RowGroups& g, std::int64_t row) {
  std::uint32_t header = 0;
  for (int i = 0; i < 4; ++i) header |= static_cast<std::uint32_t>(stats[i]) << (8 * i);
  if (header == header_of(g)) return;
  fail(Errc::kCorrupt, "packed statistics: header of row " + std::to_string(row) + " is " +
                           std::to_string(header) + ", expected " + std::to_string(header_of(g)));
}

}  // namespace

void spread_stats(const PackedSpec& spec, const FlatStats& flat, std::int64_t first_row,
                  std::uint8_t* stats, const Executor& executor) {
  require_row_runs(spec, "spread_stats");
  const PackedLayout layout = layout_of(spec);
  if (spec.rows == 0) return;
  require_arrays(spec, flat);
  const std::int64_t bytes = scale_bytes(spec.scale);
  const RowParts parts = row_parts(spec, layout);
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const RowGroups g = row_groups(spec, first_row + r);
      std::uint8_t* row = stats + r * layout.stat_bytes;
      std::memset(row, 0, static_cast<std::size_t>(layout.stat_bytes));
      if (layout.has_header) {
        const std::uint32_t header = header_of(g);
        for (int i = 0; i < 4; ++i) row[i] = static_cast<std::uint8_t>(header >> (8 * i));
      }
      copy_bytes(row + parts.scales, flat.scales + g.first * bytes, g.count * bytes);
      if (has_offset_slots(spec)) {
        copy_bytes(row + parts.offsets, flat.offsets + g.first * bytes, g.count * bytes);
      }
      if (spec.scale == ScaleSource::kNestedU8) {
        copy_bytes(row + parts.nested, flat.absmax2 + g.nested_first, g.nested_count * 4);
      }
      if (is_super(spec.scale)) {
        copy_bytes(row + parts.nested, flat.supers + g.nested_first, g.nested_count * 2);
        if (stores_offsets(spec.offset)) {
          copy_bytes(row + parts.nested_offsets, flat.super_offsets + g.nested_first,
                     g.nested_count * 2);
        }
      }
    }
  };
  executor.parallel_for(0, spec.rows, ceil_div(std::int64_t{1} << 16, layout.stat_bytes + 1), body);
}

GatheredStats gather_stats(const PackedView& w) {
  require_row_runs(w.spec, "gather_stats");
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const RowParts parts = row_parts(spec, layout);
  const std::int64_t bytes = scale_bytes(spec.scale);
  const std::int64_t groups = ceil_div(spec.rows * spec.cols, spec.group_size);
  const auto blocks = static_cast<std::size_t>(ceil_div(groups, spec.nested_group_size));
  const bool nested = spec.scale == ScaleSource::kNestedU8;
  GatheredStats out;
  out.scales.resize(static_cast<std::size_t>(groups * bytes));
  if (has_offset_slots(spec)) out.offsets.resize(out.scales.size());
  if (nested) out.absmax2.resize(blocks);
  if (is_super(spec.scale)) out.supers.resize(blocks);
  if (is_super(spec.scale) && stores_offsets(spec.offset)) out.super_offsets.resize(blocks);
  std::int64_t known = 0;
  std::int64_t nested_known = 0;
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    const RowGroups g = row_groups(spec, r);
    const std::uint8_t* row = w.stats.data() + r * layout.stat_bytes;
    if (layout.has_header) check_header(row, g, r);
    if (!out.offsets.empty()) {
      merge(row + parts.offsets, g.first, g.count, bytes, known, out.offsets.data(), r, "offset");
    }
    if (nested) {
      nested_known = merge(row + parts.nested, g.nested_first, g.nested_count, 4, nested_known,
                           reinterpret_cast<std::uint8_t*>(out.absmax2.data()), r, "absmax2");
    }
    if (!out.supers.empty()) {  // never shared by rows
      copy_bytes(reinterpret_cast<std::uint8_t*>(out.supers.data() + g.nested_first),
                 row + parts.nested, g.nested_count * 2);
    }
    if (!out.super_offsets.empty()) {
      copy_bytes(reinterpret_cast<std::uint8_t*>(out.super_offsets.data() + g.nested_first),
                 row + parts.nested_offsets, g.nested_count * 2);
    }
    known =
        merge(row + parts.scales, g.first, g.count, bytes, known, out.scales.data(), r, "scale");
  }
  return out;
}

}  // namespace quantal

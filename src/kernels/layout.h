// Private facts about the storage of statistics and the tables of codes, shared by the files that
// read them.
#pragma once

#include <array>
#include <cstdint>

#include "quantal/kernels.h"

namespace quantal {

/// Scales that consist of a byte per group and an f16 per super-block of groups.
constexpr bool is_super(ScaleSource s) {
  return s == ScaleSource::kSuperU8 || s == ScaleSource::kSuperI8 || s == ScaleSource::kSuperU4;
}
/// Scales of which every element stands for itself.
constexpr bool is_plain(ScaleSource s) { return !is_super(s) && s != ScaleSource::kNestedU8; }

/// Bytes of one scale (of one group, without its second level).
constexpr std::int64_t scale_bytes(ScaleSource s) {
  if (s == ScaleSource::kF32) return 4;
  return s == ScaleSource::kF16 || s == ScaleSource::kBF16 ? 2 : 1;
}

/// True if `slots` offset elements follow the scales of a row: kSuperU4 holds both in one byte.
constexpr bool has_offset_slots(const PackedSpec& spec) {
  return stores_offsets(spec.offset) && spec.scale != ScaleSource::kSuperU4;
}

/// The fixed table of a map of 16 values; null for other maps and for kTable.
const std::array<float, 16>* fixed_table(CodeMap map);

}  // namespace quantal

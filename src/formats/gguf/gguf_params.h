// GGUF: the packed form of each block type.
#pragma once

#include <array>
#include <cstdint>

#include "quantal/formats.h"
#include "quantal/ggml.h"

namespace quantal::gguf {

inline constexpr int kDialectId = 5;
inline constexpr std::array<int, 6> kBits = {2, 3, 4, 5, 6, 8};
inline constexpr std::array<std::int64_t, 2> kGroupSizes = {16, 32};

/// How a block type's values are made of codes and statistics; PackedSpec has the meaning of each
/// member. `sub_blocks` groups of `group_size` codes make a block.
struct BlockForm {
  GgmlType type;
  int bits;
  CodeMap code_map;
  int centre;
  Offset offset;
  ScaleSource scale;
  std::int64_t group_size;
  std::int64_t sub_blocks;
};

inline constexpr std::array<BlockForm, 11> kForms = {{
    {GgmlType::kQ4_0, 4, CodeMap::kInteger, 8, Offset::kNone, ScaleSource::kF16, 32, 1},
    {GgmlType::kQ4_1, 4, CodeMap::kInteger, 0, Offset::kBias, ScaleSource::kF16, 32, 1},
    {GgmlType::kQ5_0, 5, CodeMap::kInteger, 16, Offset::kNone, ScaleSource::kF16, 32, 1},
    {GgmlType::kQ5_1, 5, CodeMap::kInteger, 0, Offset::kBias, ScaleSource::kF16, 32, 1},
    {GgmlType::kQ8_0, 8, CodeMap::kInteger, 128, Offset::kNone, ScaleSource::kF16, 32, 1},
    {GgmlType::kQ2_K, 2, CodeMap::kInteger, 0, Offset::kShift, ScaleSource::kSuperU4, 16, 16},
    {GgmlType::kQ3_K, 3, CodeMap::kInteger, 4, Offset::kNone, ScaleSource::kSuperI8, 16, 16},
    {GgmlType::kQ4_K, 4, CodeMap::kInteger, 0, Offset::kShift, ScaleSource::kSuperU8, 32, 8},
    {GgmlType::kQ5_K, 5, CodeMap::kInteger, 0, Offset::kShift, ScaleSource::kSuperU8, 32, 8},
    {GgmlType::kQ6_K, 6, CodeMap::kInteger, 32, Offset::kNone, ScaleSource::kSuperI8, 16, 16},
    {GgmlType::kIQ4_NL, 4, CodeMap::kIq4Nl, 0, Offset::kNone, ScaleSource::kF16, 32, 1},
}};

/// nullptr for a type without a packed form.
constexpr const BlockForm* find_form(GgmlType type) {
  for (const BlockForm& form : kForms) {
    if (form.type == type) return &form;
  }
  return nullptr;
}

/// Packs rows of blocks on the calling thread: spec.rows of them, the packed form of `type`, into
/// every byte of `codes` and `stats`. `scratch` [spec.cols].
void pack_blocks(GgmlType type, const PackedSpec& spec, const std::uint8_t* blocks,
                 std::uint8_t* codes, std::uint8_t* stats, std::uint8_t* scratch);

}  // namespace quantal::gguf

// Names of element types in a safetensors header.
#pragma once

#include <array>
#include <string_view>

#include "quantal/core.h"

namespace quantal::io {

struct SafetensorsDtype {
  std::string_view name;
  DType dtype;
  /// Place in the reference writer's enumeration: it puts higher ones first in a file.
  int rank;
};

/// The types that quantal holds in memory.
inline constexpr std::array<SafetensorsDtype, 16> kSafetensorsDtypes = {{
    {"BOOL", DType::kBool, 0},
    {"U8", DType::kU8, 4},
    {"I8", DType::kI8, 5},
    {"F8_E5M2", DType::kF8E5M2, 6},
    {"F8_E4M3", DType::kF8E4M3, 7},
    {"F8_E8M0", DType::kF8E8M0, 8},
    {"I16", DType::kI16, 11},
    {"U16", DType::kU16, 12},
    {"F16", DType::kF16, 13},
    {"BF16", DType::kBF16, 14},
    {"I32", DType::kI32, 15},
    {"U32", DType::kU32, 16},
    {"F32", DType::kF32, 17},
    {"F64", DType::kF64, 19},
    {"I64", DType::kI64, 20},
    {"U64", DType::kU64, 21},
}};

/// Legal in the format, without a counterpart in memory.
inline constexpr std::array<std::string_view, 6> kSafetensorsForeignDtypes = {
    "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"};

}  // namespace quantal::io

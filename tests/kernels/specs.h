// Specs that between them reach every branch of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "quantal/kernels.h"

namespace quantal::testing {

inline constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 8};

/// Every width with every offset, scale source, group map and value type that go together; code
/// maps with every scale source.
inline void add_combinations(std::vector<PackedSpec>& specs) {
  const auto add = [&specs](const PackedSpec& s) {
    try {
      validate_spec(s);
    } catch (const Error&) {
      return;  // which are illegal is tested in packed_test
    }
    specs.push_back(s);
  };
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  std::size_t count = 0;
  for (int bits : kWidths) {
    for (int offset = 0; offset <= static_cast<int>(Offset::kOver127); ++offset) {
      for (int scale = 0; scale <= static_cast<int>(ScaleSource::kSuperU4); ++scale) {
        for (int map = 0; map <= static_cast<int>(GroupMap::kColumnBlocks); ++map) {
          PackedSpec s{.rows = 6,
                       .cols = 512,
                       .bits = bits,
                       .centre = static_cast<int>(count % 3) * 4,
                       .offset = static_cast<Offset>(offset),
                       .scale = static_cast<ScaleSource>(scale),
                       .value_dtype = types[count++ % 3],
                       .group_map = static_cast<GroupMap>(map),
                       .group_size = map == 2 ? 3 : 16 << (count / 3 % 3),
                       .nested_group_size = count % 2 == 0 ? 8 : 4};
          add(s);
          s.value_dtype = types[count % 3];
          s.cols = 3 * s.group_size * s.nested_group_size;
          add(s);
          s.cols = 101;
          s.group_size = map == 2 ? 2 : map == 1 ? 6 * 101 : 24;
          add(s);
        }
      }
    }
  }
  for (int map = 1; map <= static_cast<int>(CodeMap::kE5M2); ++map) {
    for (int scale = 0; scale <= static_cast<int>(ScaleSource::kSuperU4); ++scale) {
      for (DType type : types) {
        PackedSpec s{.rows = 7,
                     .cols = 256,
                     .bits = map >= static_cast<int>(CodeMap::kE4M3) ? 8 : 4,
                     .code_map = static_cast<CodeMap>(map),
                     .scale = static_cast<ScaleSource>(scale),
                     .value_dtype = type,
                     .group_size = 32,
                     .nested_group_size = 8};
        if (s.scale == ScaleSource::kSuperU4) s.offset = Offset::kShift;
        add(s);
        s.cols = 131;
        s.group_size = 20;
        add(s);
      }
    }
  }
}

inline constexpr DType kValueTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

/// Integers of 4 and 8 bits with every offset and value type, groups that divide rows and not.
inline void add_integers(std::vector<PackedSpec>& specs) {
  for (DType value : kValueTypes) {
    for (int offset = 0; offset < 4; ++offset) {
      for (int bits : {4, 8}) {
        specs.push_back({.rows = 9,
                         .cols = 256,
                         .bits = bits,
                         .centre = bits == 8 ? 128 : 8,
                         .offset = static_cast<Offset>(offset),
                         .value_dtype = value});
        specs.push_back({.rows = 6,
                         .cols = 100,
                         .bits = bits,
                         .offset = static_cast<Offset>(offset),
                         .scale = ScaleSource::kF16,
                         .value_dtype = value,
                         .group_size = 24});
        specs.push_back({.rows = 7,
                         .cols = 96,
                         .bits = bits,
                         .offset = static_cast<Offset>(offset),
                         .scale = ScaleSource::kBF16,
                         .value_dtype = value,
                         .group_map = GroupMap::kColumnRuns,
                         .group_size = 42});
      }
    }
  }
}

/// Tables of 16 values, scales plain and nested.
inline void add_codebooks(std::vector<PackedSpec>& specs) {
  for (DType value : kValueTypes) {
    for (CodeMap map : {CodeMap::kNf4, CodeMap::kFp4, CodeMap::kTable}) {
      specs.push_back(
          {.rows = 5, .cols = 320, .code_map = map, .value_dtype = value, .group_size = 32});
      for (const auto& [cols, nested] : {std::pair{160, 4}, std::pair{2048, 256}}) {
        specs.push_back({.rows = 13,
                         .cols = cols,
                         .code_map = map,
                         .scale = ScaleSource::kNestedU8,
                         .value_dtype = value,
                         .group_size = 64,
                         .nested_group_size = nested});
      }
    }
  }
  specs.push_back({.rows = 3, .cols = 8704, .code_map = CodeMap::kNf4, .group_size = 4096});
  specs.push_back({.rows = 3, .cols = 8192, .code_map = CodeMap::kNf4, .group_size = 8192});
  specs.push_back({.rows = 1, .cols = 70, .code_map = CodeMap::kNf4, .group_size = 1024});
}

/// Rows of one unit, a column more and less, groups that end inside units and rows.
inline void add_lengths(std::vector<PackedSpec>& specs) {
  for (int bits : kWidths) {
    for (std::int64_t cols : {1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 576, 577, 4112}) {
      for (std::int64_t group : {1, 3, 16, 48, 64, 128}) {
        if (bits != 4 && bits != 8 && cols % group != 0 && group > 3 && cols > 64) continue;
        specs.push_back({.rows = 5,
                         .cols = cols,
                         .bits = bits,
                         .offset = Offset::kZeroPoint,
                         .group_size = group});
      }
    }
    for (std::int64_t group : {16, 32, 64, 96, 128, 256}) {
      for (std::int64_t groups : {1, 5, 11}) {
        specs.push_back({.rows = 9,
                         .cols = groups * group,
                         .bits = bits,
                         .centre = 1,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16,
                         .group_size = group});
      }
    }
  }
}

/// Specs that between them reach every branch of the decoder: all widths, maps, offsets and scale
/// sources, every value type, groups that divide units and rows, that cross them on multiples of
/// 64, 16, 4 and 1, rows of one unit, a column more and less.
inline std::vector<PackedSpec> kernel_specs() {
  std::vector<PackedSpec> specs;
  add_integers(specs);
  add_codebooks(specs);
  add_lengths(specs);
  add_combinations(specs);
  specs.push_back({.rows = 0, .cols = 64});
  return specs;
}

}  // namespace quantal::testing

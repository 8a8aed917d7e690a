// MLX: modes, their widths and group sizes, and the facts that a packed spec keeps for the writer.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "quantal/formats.h"

namespace quantal::mlx {

inline constexpr int kDialectId = 3;
inline constexpr std::array<int, 7> kBits = {1, 2, 3, 4, 5, 6, 8};
/// Of affine codes; each floating mode has one size of its own.
inline constexpr std::array<std::int64_t, 3> kGroupSizes = {32, 64, 128};

enum class Mode { kAffine, kMxfp4, kNvfp4, kMxfp8 };

/// What a mode fixes. `bits` and `group_size` are the defaults of affine.
struct ModeFacts {
  Mode mode;
  std::string_view name;
  int bits;
  std::int64_t group_size;
  CodeMap code_map;
  ScaleSource scale;  ///< of affine: that of the value type
};
inline constexpr std::array<ModeFacts, 4> kModes = {{
    {Mode::kAffine, "affine", 4, 64, CodeMap::kInteger, ScaleSource::kF32},
    {Mode::kMxfp4, "mxfp4", 4, 32, CodeMap::kE2M1, ScaleSource::kE8M0},
    {Mode::kNvfp4, "nvfp4", 4, 16, CodeMap::kE2M1, ScaleSource::kE4M3},
    {Mode::kMxfp8, "mxfp8", 8, 32, CodeMap::kE4M3, ScaleSource::kE8M0},
}};

/// Facts of a mode by name ("" is affine); nullptr if there is none.
const ModeFacts* find_mode(std::string_view name);
/// "affine, mxfp4, nvfp4, mxfp8"
std::string mode_names();
/// Facts of the mode that a spec of this dialect has.
const ModeFacts& mode_of(const PackedSpec& spec);

/// What a file says about a layer beside its tensors.
struct Settings {
  const ModeFacts* mode = &kModes[0];
  int bits = 4;
  std::int64_t group_size = 64;

  bool operator==(const Settings&) const = default;
};
Settings settings_of(const PackedSpec& spec);

/// Why `settings` are not legal ("bits is 7, expected one of 1, 2, 3, 4, 5, 6, 8"); empty if they
/// are.
std::string complaint(const Settings& settings);

/// The packed form of a matrix. `value_dtype` is also the storage of affine scales and biases.
/// Throws what validate_spec throws.
PackedSpec spec_of(std::int64_t rows, std::int64_t cols, const Settings& settings,
                   DType value_dtype);

/// PackedSpec::dialect_flags: the first dimension of a stacked weight [experts, rows / experts,
/// cols] (SwitchLinear); 0 for a matrix.
inline std::int64_t experts_of(const PackedSpec& spec) { return spec.dialect_flags; }

}  // namespace quantal::mlx

#include "formats/mlx/mlx_params.h"

#include <algorithm>

#include "formats/tensors.h"

namespace quantal::mlx {

const ModeFacts* find_mode(std::string_view name) {
  if (name.empty()) return &kModes[0];
  const auto it = std::find_if(kModes.begin(), kModes.end(),
                               [name](const ModeFacts& m) { return m.name == name; });
  return it == kModes.end() ? nullptr : &*it;
}

std::string mode_names() {
  std::string out;
  for (const ModeFacts& m : kModes) out += (out.empty() ? "" : ", ") + std::string(m.name);
  return out;
}

const ModeFacts& mode_of(const PackedSpec& spec) {
  for (const ModeFacts& m : kModes) {
    if (m.mode != Mode::kAffine && m.code_map == spec.code_map && m.scale == spec.scale) return m;
  }
  return kModes[0];
}

Settings settings_of(const PackedSpec& spec) {
  return {&mode_of(spec), spec.bits, spec.group_size};
}

std::string complaint(const Settings& s) {
  const bool affine = s.mode->mode == Mode::kAffine;
  if (affine && std::find(kBits.begin(), kBits.end(), s.bits) == kBits.end()) {
    std::string legal;
    for (const int b : kBits) legal += (legal.empty() ? "" : ", ") + std::to_string(b);
    return "bits is " + std::to_string(s.bits) + ", expected one of " + legal;
  }
  if (affine &&
      std::find(kGroupSizes.begin(), kGroupSizes.end(), s.group_size) == kGroupSizes.end()) {
    return "group_size is " + std::to_string(s.group_size) + ", expected one of " +
           join_numbers(kGroupSizes);
  }
  if (affine) return {};
  const std::string in_mode = " in mode " + std::string(s.mode->name);
  if (s.bits != s.mode->bits) {
    return "bits is " + std::to_string(s.bits) + in_mode + ", expected " +
           std::to_string(s.mode->bits);
  }
  if (s.group_size != s.mode->group_size) {
    return "group_size is " + std::to_string(s.group_size) + in_mode + ", expected " +
           std::to_string(s.mode->group_size);
  }
  return {};
}

PackedSpec spec_of(std::int64_t rows, std::int64_t cols, const Settings& settings,
                   DType value_dtype) {
  const bool affine = settings.mode->mode == Mode::kAffine;
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = settings.bits;
  spec.code_map = settings.mode->code_map;
  spec.offset = affine ? Offset::kBias : Offset::kNone;
  spec.scale = affine ? scale_source_of(value_dtype) : settings.mode->scale;
  spec.value_dtype = value_dtype;
  spec.group_size = settings.group_size;
  spec.dialect = kDialectId;
  validate_spec(spec);
  return spec;
}

}  // namespace quantal::mlx

// MLX: names and tensors of a layer, settings and files beside the weights.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "formats/mlx/mlx_params.h"
#include "quantal/formats.h"

namespace quantal::mlx {

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
/// Without settings, width and group size are deduced from the shapes where they leave no choice:
/// always in the floating modes, for affine layers if facts.weight_shape is known or packed * 32 /
/// groups fits one pair only. Throws Error{kCorrupt} naming what is missing where they do not.
StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts);

/// mlx-lm, npz, guide.
extern const std::array<FileLayout, 5> kLayouts;
SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense);
/// From `quantization` (or its copy `quantization_config`) of config.json, else from
/// mlx_config.json.
std::map<std::string, std::string> read_settings(const SideTexts& texts);

/// A layer's settings as read_settings writes them for open_layer.
struct LayerSettings {
  bool quantized = true;
  std::optional<Settings> settings;  ///< absent: to be deduced
  DType value_dtype = DType::kBF16;  ///< of floating modes, which store none
};
/// Throws Error{kConfig} for anything that read_settings does not write.
LayerSettings parse_layer_settings(const std::string& json);

}  // namespace quantal::mlx

// Quanto: tensors of a layer, and the files and settings beside them.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "formats/quanto/quanto_params.h"
#include "quantal/formats.h"

namespace quantal::quanto {

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts);

extern const std::array<FileLayout, 4> kLayouts;
SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense);
std::map<std::string, std::string> read_settings(const SideTexts& texts);

/// Settings of one layer, as read_settings spells them:
/// {"weights": "qint4", "activations": "none", "optimizer": "hqq", "weight_shape": [out, in]}.
struct LayerSettings {
  QType weights = QType::kNone;  ///< kNone: unknown
  QType activations = QType::kNone;
  bool optimize = false;
  std::vector<std::int64_t> weight_shape{};  ///< empty: unknown
};
/// Throws Error{kCorrupt} naming the key.
LayerSettings parse_layer_settings(const std::string& json, const std::string& where);

/// True if a reader that knows only the tensors of the layer finds its shape.
bool shape_is_evident(const PackedSpec& spec);
/// Shapes [out, in] of which upstream's modules make a grouped matrix [grouped_rows, grouped_cols]
/// along axis 0; out is `bias` where that is not 0. At most two are returned.
std::vector<std::vector<std::int64_t>> possible_shapes(std::int64_t grouped_rows,
                                                       std::int64_t grouped_cols,
                                                       std::int64_t bias);

}  // namespace quantal::quanto

// bitsandbytes: names and tensors in a state dict, files and settings beside them.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal::bnb {

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts);

/// "transformers": folder with config.json (quantization_config); "guide": pytorch_model.bin and
/// quantization_config.json; "single": one torch file without settings.
extern const std::array<FileLayout, 4> kLayouts;

/// Settings follow from the layers' specs. Throws Error{kUnsupported} where transformers' config
/// cannot say what the layers are (4 and 8 bits in one model).
SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense);
/// Of a layer only `llm_int8_threshold` matters; everything else is in its tensors.
std::map<std::string, std::string> read_settings(const SideTexts& texts);

}  // namespace quantal::bnb

// HQQ: the fields of a layer in a file.
#pragma once

#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal::hqq {

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts);

}  // namespace quantal::hqq

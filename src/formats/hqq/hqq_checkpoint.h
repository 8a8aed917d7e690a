// HQQ: names and tensors in a safetensors state dict, quantization_config of transformers.
#pragma once

#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal::hqq {

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
PackedMatrix import_layer(const std::string& prefix, const TensorLookup& lookup,
                          const LayerFacts& facts);
std::string hf_quantization_config(const QuantizeOptions& options,
                                   std::span<const std::string> skip_modules);
bool parse_hf_quantization_config(const std::string& json, QuantizeOptions& options);

}  // namespace quantal::hqq

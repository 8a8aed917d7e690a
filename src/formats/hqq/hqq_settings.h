// HQQ: layouts of whole models and the settings beside the weights. Settings are hints: the fields
// of each layer say everything, so importing never needs them.
//
//   transformers  config.json: {"quantization_config": {"quant_method": "hqq", "quant_config": ...,
//                 "skip_modules": [...]}}; quant_config is one set of parameters, or one per tag of
//                 layers ("self_attn.q_proj") where layers differ
//   hqq, qmodel   config.json says nothing of quantization
//   guide         hqq_config.json: {"weight_quant_params": {nbits, group_size, quant_zero,
//                 quant_scale}, "scale_quant_params": ..., "zero_quant_params": ...}
#pragma once

#include <array>
#include <map>
#include <span>
#include <string>

#include "quantal/formats.h"

namespace quantal::hqq {

extern const std::array<FileLayout, 6> kLayouts;
SideFiles side_files(const FileLayout& layout, std::span<const LayerEntry> layers,
                     std::span<const std::string> dense);
std::map<std::string, std::string> read_settings(const SideTexts& texts);

}  // namespace quantal::hqq

// Merging adapters into the weights of a model, and what of them survives; dense models again.
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <optional>
#include <string>
#include <vector>

#include "quantal/merge_report.h"

namespace quantal {

/// Adds adapters to the weights, as PEFT's merge_adapter; forward() then uses the weights alone.
///
/// A packed weight is decoded, the changes of all merged adapters are added to the values from
/// before the first merge, and the sum is quantized once into the same form, which rounds:
/// merge_report says what is left. Except for that the product stays what it was, for several
/// adapters with DoRA among them too (PEFT's merge takes other norms there than its forward). The
/// packed bytes from before are kept for unmerge_adapter; a
/// dense layer keeps a copy of its weight.
///
/// names       adapters in order; empty: the active ones. Those that are merged already stay so.
/// safe_merge  check that all sums are finite first: Error{kUnsupported} naming the layer
///
/// Throws Error{kConfig} for unknown names, and what Dialect::quantize throws; a layer that fails
/// is left as it was, those before it are merged.
void merge_adapter(torch::nn::Module& model, const std::vector<std::string>& names = {},
                   bool safe_merge = false);
/// Puts the weights from before merge_adapter back, exactly.
void unmerge_adapter(torch::nn::Module& model);
/// What the merges that `model` carries changed, after merge_adapter or merge_and_unload; layers
/// without a merge, and dense ones, do not appear.
MergeReport merge_report(torch::nn::Module& model);
/// merge_adapter, layer by layer, then removes all adapters and the kept weights.
void merge_and_unload(torch::nn::Module& model, const std::vector<std::string>& names = {},
                      bool safe_merge = false);
/// Removes all adapters; merged ones are taken out first.
void unload(torch::nn::Module& model);

/// Replaces, in place, every quantized linear layer and embedding by a dense one of its exact
/// values, in `dtype`; unset: the dtype that each layer's format decodes to.
void dequantize_model(torch::nn::Module& model, std::optional<torch::ScalarType> dtype = {});
/// Merges adapters into dense weights, which loses nothing to quantization, and removes all
/// adapters; every layer is dense afterwards. Arguments as merge_adapter and dequantize_model; sums
/// are made in float32 and rounded once. Layer by layer: never two dense models in memory.
void merge_to_full_precision(torch::nn::Module& model, const std::vector<std::string>& names = {},
                             std::optional<torch::ScalarType> dtype = {}, bool safe_merge = false);

}  // namespace quantal

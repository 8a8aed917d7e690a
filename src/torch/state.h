// The dense tensors of a model under the names that files use.
#pragma once

#include <torch/nn/module.h>

#include <string>
#include <utility>
#include <vector>

namespace quantal {

/// Parameters and buffers that belong in a base checkpoint: everything but packed buffers and LoRA;
/// biases of packed layers, and what layers of another form hold, under "<layer>.<tensor>". Tied
/// ones once, in registration order.
std::vector<std::pair<std::string, torch::Tensor>> base_tensors(torch::nn::Module& model);

/// Freezes everything but adapters.
void freeze_base(torch::nn::Module& model);

}  // namespace quantal

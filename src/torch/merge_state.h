// What a linear layer remembers of merged adapters.
#pragma once

#include <torch/types.h>

#include <optional>
#include <string>
#include <vector>

#include "quantal/torch/ops.h"
#include "torch/survival.h"

namespace quantal {

struct MergeState {
  std::vector<std::string> names;  ///< merged adapters, in order; empty after an unload
  // The weight from before, to be put back: one of the three, by the form of the layer.
  torch::Tensor dense;
  PackedTensors packed;
  std::vector<torch::Tensor> custom;  ///< copies of parameters, then buffers
  /// What quantizing the sum kept of it; unset for a dense layer.
  std::optional<Survival> survival;
};

}  // namespace quantal

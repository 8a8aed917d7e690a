// The planner over torch::nn::Module: a module's names, shapes and types instead of a file's.
#pragma once

#include <torch/nn/module.h>

#include <string>

#include "quantal/plan.h"

namespace quantal {

/// Outline of a module: every quantal::Linear that is still dense counts as a linear layer, packed
/// ones as they are, LoRA pairs as adapters that train, all else dense. Weights that share memory
/// count once; no value is read. `config_json` is the model's config.json, where there is one.
/// Throws Error{kDtype} for element types that quantal does not know.
ModelOutline outline_of(torch::nn::Module& model, const std::string& config_json = "{}");

/// plan(outline_of(model, config_json), options).
Plan plan(torch::nn::Module& model, const PlanOptions& options,
          const std::string& config_json = "{}");

}  // namespace quantal

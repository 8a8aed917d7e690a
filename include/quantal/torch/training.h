// Preparing a model for adapter training.
#pragma once

#include <torch/nn/module.h>

namespace quantal {

/// What prepare_model_for_training does beside freezing; names and defaults as in Python.
struct TrainingOptions {
  /// Recompute activations in backward, where the model offers it (Llama).
  bool use_gradient_checkpointing = true;
  /// Turn float16 and bfloat16 parameters of norms into float32.
  bool norms_in_float32 = false;
};

/// Freezes the base and switches to training mode. Adapters that are there keep their state, those
/// attached afterwards (add_lora) are all that trains; a second call changes nothing.
///
/// A norm is a module whose class name contains "norm"; those of Llama and of torch then return the
/// dtype of what they get.
void prepare_model_for_training(torch::nn::Module& model, const TrainingOptions& options = {});

}  // namespace quantal

// LoRA in C++, in PEFT's file format.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "quantal/torch/linear.h"

namespace quantal {

/// The members of PEFT's LoraConfig that decide the arithmetic; same names and meaning.
struct LoraConfig {
  std::int64_t r = 8;
  double lora_alpha = 8;
  double lora_dropout = 0;
  /// Names: a module matches if its dotted name equals one or ends with "." + one. The single entry
  /// "all-linear" matches every linear layer but `lm_head`.
  std::vector<std::string> target_modules = {"q_proj", "v_proj"};
  bool use_rslora = false;  ///< scaling alpha / sqrt(r) instead of alpha / r
  std::map<std::string, std::int64_t> rank_pattern;  ///< by module name as in target_modules
  std::map<std::string, double> alpha_pattern;
  std::string task_type = "CAUSAL_LM";
  std::string base_model_name_or_path;
};

/// Freezes every parameter of `model` and attaches a trainable adapter to each matching layer.
/// Returns the number of layers. Throws Error{kConfig} for r < 1, a dropout outside [0, 1), or if
/// no layer matches (naming the linear layers there are).
std::int64_t add_lora(torch::nn::Module& model, const LoraConfig& config);

/// The trainable tensors, for an optimizer.
std::vector<torch::Tensor> lora_parameters(torch::nn::Module& model);

/// Writes `folder`/adapter_config.json and adapter_model.safetensors (float32, keys
/// base_model.model.<path>.lora_A.weight), which PeftModel.from_pretrained loads.
/// Both files are written
/// atomically. Throws Error{kConfig} if the model has no adapters, Error{kIo}.
void save_lora_adapter(torch::nn::Module& model, const LoraConfig& config,
                       const std::string& folder);

/// Reads a PEFT LoRA folder into `model`, attaching the adapters (frozen unless `trainable`), and
/// returns its configuration. modules_to_save must name linear layers; their weights replace the
/// base's. Throws Error{kUnsupported} for DoRA, trained biases and other variants, Error{kCorrupt}
/// listing missing, extra and misshapen tensors.
LoraConfig load_lora_adapter(torch::nn::Module& model, const std::string& folder,
                             bool trainable = false);

}  // namespace quantal

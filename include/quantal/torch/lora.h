// LoRA and DoRA in C++, in PEFT's file format. Merging: quantal/torch/merge.h.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "quantal/torch/linear.h"

namespace quantal {

/// The members of PEFT's LoraConfig that decide the arithmetic; same names and meaning.
struct LoraConfig {
  std::int64_t r = 8;       ///< rank
  double lora_alpha = 8;    ///< scaling is lora_alpha / r
  double lora_dropout = 0;  ///< rate, of what goes into A while training
  /// Names: a module matches if its dotted name equals one or ends with "." + one. The single entry
  /// "all-linear" matches every linear layer but `lm_head`.
  std::vector<std::string> target_modules = {"q_proj", "v_proj"};
  bool use_rslora = false;  ///< scaling alpha / sqrt(r) instead of alpha / r
  /// DoRA (Liu et al., 2024): rows of W + scaling B A scaled to trained magnitudes.
  bool use_dora = false;
  std::map<std::string, std::int64_t> rank_pattern;  ///< by module name as in target_modules
  std::map<std::string, double> alpha_pattern;       ///< by module name as in target_modules
  std::string task_type = "CAUSAL_LM";               ///< for PEFT
  std::string base_model_name_or_path;               ///< for PEFT
};

/// Freezes everything but adapters and attaches a trainable one to each matching layer; as with
/// PEFT, the model's first adapter becomes active, later ones wait for set_adapter.
///
/// Returns the number of layers. Throws Error{kConfig} for r < 1, a dropout outside [0, 1), a name
/// that is taken, or if no layer matches (naming the linear layers there are).
std::int64_t add_lora(torch::nn::Module& model, const LoraConfig& config,
                      const std::string& name = "default");

/// Tensors for an optimizer: those of the adapter `name`, or of the active ones without a name.
std::vector<torch::Tensor> lora_parameters(torch::nn::Module& model, const std::string& name = "");

/// Adapters of a model, in the order in which they were added.
std::vector<std::string> adapter_names(torch::nn::Module& model);
/// Those that take part in forward(), in order.
std::vector<std::string> active_adapters(torch::nn::Module& model);
/// Makes exactly these adapters active, and trainable unless `inference_mode`; all others are
/// frozen. Throws Error{kConfig} naming the adapters there are for one that is unknown.
void set_adapter(torch::nn::Module& model, const std::vector<std::string>& names,
                 bool inference_mode = false);
/// Removes an adapter. Throws Error{kConfig} as set_adapter, and for one that is merged.
void delete_adapter(torch::nn::Module& model, const std::string& name);

/// Writes `folder`/adapter_config.json and adapter_model.safetensors (float32, keys
/// base_model.model.PATH.lora_A.weight), which PeftModel.from_pretrained loads. PEFT keeps
/// adapters other than "default" in subfolders of their names. Both files are written atomically.
/// Throws Error{kConfig} if the model has no such adapter, Error{kIo}.
void save_lora_adapter(torch::nn::Module& model, const LoraConfig& config,
                       const std::string& folder, const std::string& name = "default");

/// Reads a PEFT folder of LoRA or DoRA into `model` as the adapter `name`, frozen unless
/// `trainable`, and returns its configuration. It replaces an adapter of that name, and is active
/// if it is the model's first.
///
/// modules_to_save must name linear layers; their weights replace the base's. Throws
/// Error{kUnsupported} for trained biases and other variants, Error{kCorrupt} listing missing,
/// extra and misshapen tensors; the model is as it was then.
LoraConfig load_lora_adapter(torch::nn::Module& model, const std::string& folder,
                             bool trainable = false, const std::string& name = "default");

}  // namespace quantal

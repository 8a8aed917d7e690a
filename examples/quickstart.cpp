// Quantize a model, attach LoRA adapters, save the base and load it again: quickstart.py in C++.
#include <quantal/torch.h>
#include <torch/torch.h>

#include <iostream>

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "build/quickstart-cpp";
  auto model = quantal::Llama(quantal::LlamaConfig::from_json(R"({
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1000})"));
  model->initialize(/*seed=*/0);

  quantal::QuantizationConfig config;
  config.method = quantal::QuantizationMethod::HQQ;
  config.bits = 4;
  config.group_size = 64;
  config.compute_dtype = quantal::DType::kF32;
  auto adapter = quantal::create_quantization_adapter(quantal::Backend::CPU, config);
  adapter->quantize_model(*model);  // layer by layer; no full-precision copy remains
  std::cout << adapter->report().to_text() << "\n";  // what became how small, and what not and why

  // The folder loads in hqq and transformers too.
  adapter->save_quantized_model(*model, folder, model->config().json, {.overwrite = true});
  model = quantal::load_quantized_llama(folder, *adapter);
  adapter->prepare_model_for_training(*model);
  quantal::LoraConfig lora;
  lora.r = 16;
  lora.lora_alpha = 32;
  lora.target_modules = {"q_proj", "v_proj"};
  std::cout << "adapters on " << quantal::add_lora(*model, lora) << " layers\n";
  const auto ids = torch::arange(64).unsqueeze(0);
  const auto loss = model->loss(ids);
  loss.backward();  // QLoRA: gradients reach the adapters through the packed weights
  std::cout << "loss " << loss.item<double>() << "\n";
}

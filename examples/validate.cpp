// What is wrong with a configuration, what to take instead, and what this machine runs.
#include <iostream>
#include <quantal/quantal.hpp>

int main() {
  using quantal::Backend;
  quantal::QuantizationConfig config;
  config.method = quantal::QuantizationMethod::HQQ;
  config.group_size = 48;  // no divisor of the layers below
  config.compute_dtype = quantal::DType::kBF16;
  config.layer_configs = {{"model.layers.9", {.bits = 8}}};

  // With the linear layers of a model, group sizes and patterns are tried on them.
  const quantal::ValidationFacts facts{.layers = {{{"model.layers.0.mlp.up_proj", 128, 64},
                                                   {"model.layers.0.mlp.down_proj", 64, 128}}}};
  for (const auto& issue : quantal::validate_quantization_config(config, Backend::MPS, facts)) {
    std::cout << issue.severity << " " << issue.id << ": " << issue.message << " (" << issue.remedy
              << ")\n";
  }

  // A 7B model on a laptop with 16 GB that the system shares.
  const auto recommended = quantal::get_recommended_config(Backend::MPS, 7.0, 16.0);
  std::cout << "recommended: " << quantal::method_name(recommended.method) << "\n\n";

  std::cout << quantal::report_import_status(Backend::CPU) << "\n";
}

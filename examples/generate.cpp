// Generate greedily from a quantized Llama with a cache of keys and values; prints tokens per
// second.
//
//   generate model.gguf --ids 504,3575,282 --new-tokens 128
//   generate folder --prompt-tokens 512
//
// MODEL is a GGUF file or a folder that quantal or an upstream package wrote; what is packed there
// stays packed. Token ids come from the tokenizer of your choice.
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "quantal/torch.h"

namespace {

struct Arguments {
  std::string model, compute_dtype = "bfloat16";
  std::vector<std::int64_t> ids;
  std::int64_t prompt_tokens = 16, new_tokens = 32;
  int threads = 0;
  bool rounds = false;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

quantal::Llama load(const Arguments& args) {
  quantal::QuantizationConfig config;  // of this, only compute_dtype counts: the file says the rest
  config.compute_dtype = quantal::parse_dtype(args.compute_dtype);
  auto adapter = quantal::create_quantization_adapter(quantal::Backend::CPU, config,
                                                      quantal::Support::kExtended);
  auto model = quantal::load_quantized_llama(args.model, *adapter);
  model->eval();
  std::printf("%.1f MB of weights\n", static_cast<double>(quantal::storage_bytes(*model)) / 1e6);
  return model;
}

/// The given ids, or as many as asked for, spread over the vocabulary.
torch::Tensor prompt_of(const Arguments& args, std::int64_t vocab_size) {
  std::vector<std::int64_t> ids = args.ids;
  for (std::int64_t i = 0; args.ids.empty() && i < args.prompt_tokens; ++i) {
    ids.push_back(i * 7919 % vocab_size);
  }
  return torch::tensor(ids).unsqueeze(0);
}

void generate(quantal::Llama& model, const torch::Tensor& prompt, std::int64_t new_tokens) {
  const torch::NoGradGuard no_grad;
  quantal::KvCache cache = model->make_cache(1, prompt.size(1) + new_tokens);
  auto start = std::chrono::steady_clock::now();
  torch::Tensor token = model->step(prompt, cache).argmax(-1, /*keepdim=*/true);
  const double prefill = seconds_since(start);
  std::vector<std::int64_t> tokens;
  start = std::chrono::steady_clock::now();
  for (std::int64_t i = 0; i < new_tokens; ++i) {
    tokens.push_back(token.item<std::int64_t>());
    token = model->step(token, cache).argmax(-1, /*keepdim=*/true);
  }
  const double decode = seconds_since(start);
  std::printf("tokens:");
  for (const std::int64_t id : tokens) std::printf(" %lld", static_cast<long long>(id));
  std::printf("\nprefill %.2f tokens/s, decode %.2f tokens/s\n",
              static_cast<double>(prompt.size(1)) / prefill,
              static_cast<double>(new_tokens) / decode);
  std::fflush(stdout);
}

void run(const Arguments& args) {
  if (args.threads > 0) at::set_num_threads(args.threads);
  auto model = load(args);
  const torch::Tensor prompt = prompt_of(args, model->config().vocab_size);
  if (!args.rounds) return generate(model, prompt, args.new_tokens);
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) generate(model, prompt, args.new_tokens);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app("Generate greedily from a quantized Llama");
  app.add_option("MODEL", args.model, "GGUF file or quantized folder")->required();
  app.add_option("--ids", args.ids, "token ids of the prompt")->delimiter(',');
  app.add_option("--prompt-tokens", args.prompt_tokens, "length of a made-up prompt, without --ids")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--new-tokens", args.new_tokens)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--threads", args.threads, "0: as many as torch takes")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--compute-dtype", args.compute_dtype)->capture_default_str();
  app.add_flag("--rounds", args.rounds, "once for every line of standard input");
  CLI11_PARSE(app, argc, argv);
  try {
    run(args);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", error.what());
    return 1;
  }
  return 0;
}

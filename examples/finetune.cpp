// Quantize a Llama, measure its perplexity, fine-tune LoRA adapters on it, save them for PEFT.
//
//   finetune --model model.gguf --eval held_out.npy --train train.npy --method hqq --steps 100
//            --out adapter/ --report report.json
//
// Token ids come from .npy files: int32 or int64, either rows [n, length] or one stream that is cut
// into rows of --seq. Perplexity is exp of the mean negative log likelihood of tokens 1 .. length-1
// of each row, each row by itself.
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quantal/io.h"
#include "quantal/torch.h"

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Arguments {
  std::string model, eval, train, method = "hqq", dtype = "float32", compute_dtype = "float32";
  std::string load_adapter, out, report, logits;
  std::vector<std::string> targets = {"q_proj", "v_proj"}, skip = {"lm_head"};
  int bits = 4;
  std::int64_t group_size = 64, lora_r = 16, steps = 0, batch = 4, seq = 256, generate = 0;
  double lora_alpha = 32, lora_dropout = 0, learning_rate = 2e-3;
  std::uint64_t seed = 0;
  bool dora = false, no_double_quant = false, no_checkpointing = false, reference = false;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Token ids [n, length].
torch::Tensor read_rows(const std::string& path, std::int64_t seq) {
  const quantal::Tensor file = quantal::read_npy(path);
  if (file.dtype != quantal::DType::kI64 && file.dtype != quantal::DType::kI32) {
    quantal::fail(quantal::Errc::kDtype,
                  "finetune: token ids are " + std::string(quantal::dtype_name(file.dtype)) +
                      ", expected i64 or i32",
                  {path, "", -1});
  }
  auto* bytes = const_cast<std::uint8_t*>(file.bytes.data());
  const auto options = torch::TensorOptions().dtype(quantal::to_torch(file.dtype));
  const auto ids = torch::from_blob(bytes, file.shape, options).to(torch::kLong, false, true);
  if (ids.dim() == 2) return ids;
  const std::int64_t rows = ids.numel() / seq;
  if (ids.dim() != 1 || rows < 1) {
    quantal::fail(quantal::Errc::kShape,
                  "finetune: token ids have shape " + quantal::shape_string(file.shape) +
                      ", expected [n, length] or at least " + std::to_string(seq) + " in a row",
                  {path, "", -1});
  }
  return ids.narrow(0, 0, rows * seq).view({rows, seq});
}

quantal::QuantizationConfig config_of(const Arguments& args) {
  quantal::QuantizationConfig config;
  config.method = quantal::parse_method(args.method);
  config.bits = args.bits;
  config.bits_set = true;
  config.group_size = args.group_size;
  config.compute_dtype = quantal::parse_dtype(args.compute_dtype);
  config.double_quant = !args.no_double_quant;
  config.skip_modules = args.skip;
  return config;
}

double evaluate(quantal::Llama& model, const torch::Tensor& rows, const char* what) {
  const auto start = Clock::now();
  const double perplexity = model->perplexity(rows);
  std::printf("perplexity %-10s %.4f  (%lld tokens, %.1f s)\n", what, perplexity,
              static_cast<long long>(rows.numel()), seconds_since(start));
  std::fflush(stdout);
  return perplexity;
}

/// Warm-up over the first tenth of the steps, then a cosine to a tenth of the peak.
double learning_rate_at(std::int64_t step, const Arguments& args) {
  const std::int64_t warmup = std::max<std::int64_t>(1, args.steps / 10);
  if (step < warmup) {
    return args.learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
  }
  const double progress = static_cast<double>(step - warmup) /
                          static_cast<double>(std::max<std::int64_t>(1, args.steps - warmup));
  return args.learning_rate * (0.1 + 0.45 * (1 + std::cos(progress * std::acos(-1.0))));
}

/// Trains the adapters on shuffled rows; returns losses and tokens per second.
Json train(quantal::Llama& model, const torch::Tensor& rows, const Arguments& args) {
  torch::optim::AdamW optimizer(quantal::lora_parameters(*model),
                                torch::optim::AdamWOptions(args.learning_rate).weight_decay(0));
  model->train();
  model->set_gradient_checkpointing(!args.no_checkpointing);
  torch::Tensor order = torch::randperm(rows.size(0), torch::kLong);
  std::int64_t next = 0;
  Json losses = Json::array();
  const auto start = Clock::now();
  for (std::int64_t step = 0; step < args.steps; ++step) {
    if (next + args.batch > rows.size(0)) {
      order = torch::randperm(rows.size(0), torch::kLong);
      next = 0;
    }
    const auto batch = rows.index_select(0, order.slice(0, next, next + args.batch));
    next += args.batch;
    for (auto& group : optimizer.param_groups())
      group.options().set_lr(learning_rate_at(step, args));
    optimizer.zero_grad();
    torch::Tensor loss = model->loss(batch);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(quantal::lora_parameters(*model), 1.0);
    optimizer.step();
    losses.push_back(loss.item<double>());
    std::printf("\rstep %lld/%lld  loss %.3f  %.1f s ", static_cast<long long>(step + 1),
                static_cast<long long>(args.steps), loss.item<double>(), seconds_since(start));
    std::fflush(stdout);
  }
  const double tokens = static_cast<double>(args.steps * args.batch * rows.size(1));
  const double rate = tokens / seconds_since(start);
  std::printf("\n%.0f training tokens/s\n", rate);
  return {{"losses", losses}, {"train_tokens_per_s", rate}};
}

void finetune(quantal::Llama& model, quantal::QuantizationAdapter& adapter,
              const torch::Tensor& held_out, const Arguments& args, Json& report) {
  quantal::LoraConfig lora;
  lora.r = args.lora_r;
  lora.lora_alpha = args.lora_alpha;
  lora.lora_dropout = args.lora_dropout;
  lora.use_dora = args.dora;
  lora.target_modules = args.targets;
  lora.base_model_name_or_path = args.model;
  adapter.prepare_model_for_training(*model);
  std::printf("%s on %lld layers\n", args.dora ? "DoRA" : "LoRA",
              static_cast<long long>(quantal::add_lora(*model, lora)));
  report.update(train(model, read_rows(args.train, args.seq), args));
  report["ppl_tuned"] = evaluate(model, held_out, "tuned");
  if (args.out.empty()) return;
  quantal::save_lora_adapter(*model, lora, args.out);
  std::printf("wrote %s\n", args.out.c_str());
}

void save_logits(quantal::Llama& model, const torch::Tensor& held_out, const std::string& path) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const auto logits = model->forward(held_out.narrow(0, 0, 1)).to(torch::kFloat32).contiguous();
  quantal::write_npy(path, {quantal::DType::kF32,
                            logits.sizes().vec(),
                            {static_cast<const std::uint8_t*>(logits.const_data_ptr()),
                             static_cast<std::size_t>(logits.numel()) * sizeof(float)}});
}

void generate(quantal::Llama& model, const torch::Tensor& held_out, const Arguments& args,
              Json& report) {
  const std::int64_t prompt = std::min<std::int64_t>(16, held_out.size(1));
  quantal::GenerateOptions options;
  options.max_new_tokens = args.generate;
  options.seed = args.seed;
  const auto start = Clock::now();
  const auto tokens = model->generate(held_out[0].narrow(0, 0, prompt), options);
  report["generated"] = tokens;
  report["generated_tokens_per_s"] = static_cast<double>(tokens.size()) / seconds_since(start);
  std::printf("generated:");
  for (const auto token : tokens) std::printf(" %lld", static_cast<long long>(token));
  std::printf("\n");
}

Json run(const Arguments& args) {
  torch::manual_seed(args.seed);
  Json report = {{"model", args.model}, {"method", args.method}};
  const torch::Tensor held_out = read_rows(args.eval, args.seq);
  auto model = quantal::load_llama(args.model, quantal::to_torch(quantal::parse_dtype(args.dtype)));
  report["bytes_reference"] = quantal::storage_bytes(*model);
  const bool quantized = args.method != "none";
  if (!quantized || args.reference) {
    report["ppl_reference"] = report["perplexity"] = evaluate(model, held_out, "reference");
  }
  auto adapter = quantal::create_quantization_adapter(quantal::Backend::CPU, config_of(args),
                                                      quantal::Support::kExtended);
  for (const auto& warning : adapter->warnings()) {
    if (quantized) std::printf("warning: %s\n", warning.c_str());
  }
  if (quantized) {
    const auto start = Clock::now();
    adapter->quantize_model(*model);
    report["quantize_seconds"] = seconds_since(start);
    report["bytes_quantized"] = quantal::storage_bytes(*model);
    report["coverage"] = Json::parse(adapter->report().to_json());
    std::printf("%s\n", adapter->report().to_text().c_str());
    report["ppl_quantized"] = report["perplexity"] = evaluate(model, held_out, args.method.c_str());
  }
  if (!args.load_adapter.empty()) {
    quantal::load_lora_adapter(*model, args.load_adapter);
    report["ppl_adapter"] = report["perplexity"] = evaluate(model, held_out, "adapter");
  }
  if (!args.train.empty() && args.steps > 0) finetune(model, *adapter, held_out, args, report);
  if (!args.logits.empty()) save_logits(model, held_out, args.logits);
  if (args.generate > 0) generate(model, held_out, args, report);
  return report;
}

void add_options(CLI::App& app, Arguments& a) {
  app.add_option("--model", a.model, "GGUF file, safetensors file or Hugging Face folder")
      ->required();
  app.add_option("--eval", a.eval, "token ids to measure perplexity on (.npy)")->required();
  app.add_option("--train", a.train, "token ids to train on (.npy)");
  app.add_option("--method", a.method, "hqq, bnb_nf4 or none")->capture_default_str();
  app.add_option("--bits", a.bits)->capture_default_str();
  app.add_option("--group-size", a.group_size)->capture_default_str();
  app.add_flag("--no-double-quant", a.no_double_quant, "bnb_nf4: plain float32 absmax");
  app.add_option("--skip", a.skip, "modules left dense")->delimiter(',')->capture_default_str();
  app.add_option("--dtype", a.dtype, "dtype of the dense weights")->capture_default_str();
  app.add_option("--compute-dtype", a.compute_dtype)->capture_default_str();
  app.add_option("--lora-r", a.lora_r)->capture_default_str();
  app.add_option("--lora-alpha", a.lora_alpha)->capture_default_str();
  app.add_option("--lora-dropout", a.lora_dropout)->capture_default_str();
  app.add_flag("--dora", a.dora, "DoRA instead of LoRA");
  app.add_option("--targets", a.targets, "layers with adapters")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--steps", a.steps, "training steps; 0 = only evaluate")->capture_default_str();
  app.add_option("--batch", a.batch, "rows per step")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--seq", a.seq, "row length of one-dimensional ids")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--lr", a.learning_rate, "peak learning rate")->capture_default_str();
  app.add_flag("--no-checkpointing", a.no_checkpointing, "keep activations instead of recomputing");
  app.add_flag("--reference", a.reference, "also measure the model before quantization");
  app.add_option("--load-adapter", a.load_adapter, "PEFT folder to evaluate with");
  app.add_option("--out", a.out, "folder for the trained adapter (PEFT format)");
  app.add_option("--logits", a.logits, "final logits of the first row of --eval (.npy, float32)");
  app.add_option("--report", a.report, "JSON file with all figures");
  app.add_option("--generate", a.generate, "tokens to generate from the first row")
      ->capture_default_str();
  app.add_option("--seed", a.seed)->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app("Quantize a Llama, evaluate it and fine-tune LoRA adapters");
  add_options(app, args);
  CLI11_PARSE(app, argc, argv);
  try {
    const Json report = run(args);
    if (!args.report.empty()) {
      const std::string text = report.dump(1) + "\n";
      quantal::write_file_atomic(args.report,
                                 {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "finetune: %s\n", error.what());
    return 1;
  }
  return 0;
}

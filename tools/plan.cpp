#include "quantal/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "commands.h"

namespace quantal::tools {
namespace {

struct PlanArguments {
  std::string path, backend = "cpu", mode = "inference", method, compute_dtype, quant_type = "nf4";
  std::string attention = "sdpa", optimizer = "adamw", lora_dtype = "float32";
  double memory_gb = 0;
  QuantizationConfig config;
  int bits = 0;
  bool json = false, documented = false, single_quant = false, no_checkpointing = false;
  PlanOptions options;
};

CLI::IsMember is_float_dtype() { return CLI::IsMember({"float32", "float16", "bfloat16"}); }

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const MethodInfo& method : methods()) names.emplace_back(method.name);
  return names;
}

void add_machine_options(CLI::App& plan, PlanArguments& a) {
  const char* group = "Machine";
  plan.add_option("--backend", a.backend, "what it will run on")
      ->group(group)
      ->check(CLI::IsMember({"cuda", "mps", "mlx", "cpu"}))
      ->capture_default_str();
  plan.add_option("--memory-gb", a.memory_gb,
                  "memory of one rank in 10^9 bytes; without it nothing is judged")
      ->group(group)
      ->check(CLI::Range(0.0, 1e9));
  plan.add_option("--world-size", a.options.world_size, "ranks that share the model (FSDP2)")
      ->group(group)
      ->capture_default_str();
  plan.add_flag("--cpu-offload", a.options.cpu_offload, "shards live in host memory")->group(group);
}

void add_config_options(CLI::App& plan, PlanArguments& a) {
  const char* group = "Config (without --method the best that fits is recommended)";
  plan.add_option("--method", a.method, "bnb_nf4, hqq, mlx_int4 ...; none: as it is")
      ->group(group)
      ->check(CLI::IsMember(method_names()));
  plan.add_option("--bits", a.bits, "where the method leaves them free")->group(group);
  plan.add_option("--group-size", a.config.group_size, "codes per scale")
      ->group(group)
      ->capture_default_str();
  plan.add_option("--quant-type", a.quant_type, "bnb: nf4 or fp4")->group(group);
  plan.add_flag("--no-double-quant", a.single_quant, "bnb: absmax as float32")->group(group);
  plan.add_option("--compute-dtype", a.compute_dtype, "of products")
      ->group(group)
      ->check(is_float_dtype());
  plan.add_option("--skip", a.config.skip_modules, "patterns: layers that stay dense")
      ->group(group)
      ->delimiter(',')
      ->capture_default_str();
  plan.add_flag("--documented", a.documented,
                "only pairs of the documented compatibility matrix, as in Python")
      ->group(group);
}

void add_run_options(CLI::App& plan, PlanArguments& a) {
  const char* group = "Run";
  PlanOptions& o = a.options;
  plan.add_option("--mode", a.mode, "inference or qlora")
      ->group(group)
      ->check(CLI::IsMember({"inference", "qlora"}))
      ->capture_default_str();
  plan.add_option("--batch-size", o.batch_size, "sequences of a rank in one step")
      ->group(group)
      ->capture_default_str();
  plan.add_option("--sequence-length", o.sequence_length, "tokens of a sequence")
      ->group(group)
      ->capture_default_str();
  plan.add_option("--attention", a.attention, "sdpa or eager")
      ->group(group)
      ->check(CLI::IsMember({"sdpa", "eager"}))
      ->capture_default_str();
  plan.add_option("--lora-rank", o.lora_rank, "rank of the adapters")
      ->group(group)
      ->capture_default_str();
  plan.add_option("--lora-targets", o.lora_targets,
                  "ends of names, as PEFT's target_modules; default: all but the head")
      ->group(group)
      ->delimiter(',');
  plan.add_option("--lora-dropout", o.lora_dropout, "of the adapters' input")->group(group);
  plan.add_option("--lora-dtype", a.lora_dtype, "of the adapters")
      ->group(group)
      ->check(is_float_dtype())
      ->capture_default_str();
  plan.add_option("--optimizer", a.optimizer, "adamw or sgd")
      ->group(group)
      ->check(CLI::IsMember({"adamw", "sgd"}))
      ->capture_default_str();
  plan.add_flag("--no-gradient-checkpointing", a.no_checkpointing, "keep all activations")
      ->group(group);
  plan.add_option("--loss-chunk", o.loss_chunk, "tokens whose logits exist at a time; 0: all")
      ->group(group);
  plan.add_flag("--norms-in-float32", o.float32_norms, "as prepare_model_for_training does")
      ->group(group);
}

void set_config(PlanArguments& a) {
  QuantizationConfig& config = a.config;
  config.method = parse_method(a.method);
  if (a.bits != 0) {
    config.bits = a.bits;
    config.bits_set = true;
  }
  config.quant_type = a.quant_type;
  config.double_quant = !a.single_quant;
  config.double_quant_set = a.single_quant;
  if (!a.compute_dtype.empty()) config.compute_dtype = parse_dtype(a.compute_dtype);
  check_config(config);
  a.options.config = config;
}

void run(PlanArguments& a) {
  constexpr double kGigabyte = 1e9;
  PlanOptions& o = a.options;
  o.backend = parse_backend(a.backend);
  o.mode = parse_plan_mode(a.mode);
  o.memory_bytes = static_cast<std::int64_t>(std::llround(a.memory_gb * kGigabyte));
  o.attention = parse_plan_attention(a.attention);
  o.optimizer = parse_plan_optimizer(a.optimizer);
  o.lora_dtype = parse_dtype(a.lora_dtype);
  o.gradient_checkpointing = !a.no_checkpointing;
  o.support = a.documented ? Support::kDocumented : Support::kExtended;
  if (!a.method.empty()) set_config(a);
  const Plan answer = plan(a.path, o);
  std::fputs((a.json ? answer.to_json() + "\n" : answer.to_text()).c_str(), stdout);
}

}  // namespace

std::shared_ptr<void> add_plan(CLI::App& app) {
  auto arguments = std::make_shared<PlanArguments>();
  PlanArguments& a = *arguments;
  CLI::App* plan = app.add_subcommand(
      "plan", "Say how much memory a model needs, from the headers of its files alone");
  plan->add_option("path", a.path, "a folder, or a .gguf, .safetensors, torch or .npz file")
      ->required();
  plan->add_flag("--json", a.json, "print JSON, with every layer");
  add_config_options(*plan, a);
  add_machine_options(*plan, a);
  add_run_options(*plan, a);
  plan->footer(
      "Examples:\n"
      "  quantal plan llama-folder\n"
      "  quantal plan llama-folder --backend mps --memory-gb 16\n"
      "  quantal plan llama-folder --method bnb_nf4 --backend cuda --memory-gb 24 --mode qlora\n"
      "  quantal plan llama-folder --method hqq --bits 4 --world-size 2 --json | jq .peak_bytes\n");
  plan->callback([arguments] { run(*arguments); });
  return arguments;
}

}  // namespace quantal::tools

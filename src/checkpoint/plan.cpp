// From a model and a question to a plan.
#include "quantal/plan.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "checkpoint/plan_parts.h"
#include "policy/methods.h"

namespace quantal {
namespace {

using checkpoint::check_plan_options;

constexpr std::array<std::string_view, kNumPlanParts> kPartNames = {
    "base",   "dense",       "adapters", "gradients", "optimizer",
    "gather", "activations", "cache",    "logits",    "workspace"};

[[noreturn]] void bad(const char* name, const std::string& value, const char* expected) {
  fail(Errc::kConfig, std::string("plan: ") + name + " is " + value + ", expected " + expected);
}

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  bad(name, std::to_string(value), (std::to_string(least) + " to " + std::to_string(most)).c_str());
}

template <class Value, std::size_t N>
Value parse_one(const char* what, std::string_view name,
                const std::array<std::pair<std::string_view, Value>, N>& known) {
  std::string names;
  for (const auto& [text, value] : known) {
    if (text == name) return value;
    names += (names.empty() ? "" : " or ") + std::string(text);
  }
  bad(what, "'" + std::string(name) + "'", names.c_str());
}

}  // namespace

std::string_view plan_mode_name(PlanMode mode) noexcept {
  return mode == PlanMode::kQlora ? "qlora" : "inference";
}

PlanMode parse_plan_mode(std::string_view name) {
  return parse_one<PlanMode, 2>(
      "mode", name, {{{"inference", PlanMode::kInference}, {"qlora", PlanMode::kQlora}}});
}

PlanOptimizer parse_plan_optimizer(std::string_view name) {
  return parse_one<PlanOptimizer, 2>(
      "optimizer", name, {{{"adamw", PlanOptimizer::kAdamW}, {"sgd", PlanOptimizer::kSgd}}});
}

PlanAttention parse_plan_attention(std::string_view name) {
  return parse_one<PlanAttention, 2>(
      "attention", name, {{{"sdpa", PlanAttention::kSdpa}, {"eager", PlanAttention::kEager}}});
}

std::string_view plan_part_name(PlanPart part) noexcept {
  return kPartNames[static_cast<std::size_t>(part)];
}

std::int64_t PlanPhase::total() const {
  std::int64_t sum = 0;
  for (const std::int64_t part : bytes) sum = checked_add(sum, part, "plan: bytes of a phase");
  return sum;
}

const PlanPhase& Plan::peak() const {
  if (phases.empty()) fail(Errc::kInternal, "plan: no phases");
  return *std::max_element(phases.begin(), phases.end(),
                           [](const auto& a, const auto& b) { return a.total() < b.total(); });
}

std::string Plan::label() const {
  const QuantizationConfig& config = decision.config;
  if (config.method == QuantizationMethod::NONE) {
    const bool packed =
        std::any_of(layers.begin(), layers.end(), [](const PlanLayer& l) { return l.quantized; });
    if (packed) return config.layer_configs.empty() ? "as stored" : "layer_configs alone";
    return "none";
  }
  return describe_options(policy::base_options(config));
}

namespace checkpoint {

void check_plan_options(const PlanOptions& o) {
  // Beyond any machine and any model; products of a few of them do not overflow unseen.
  constexpr std::int64_t kMost = std::int64_t{1} << 40, kMostRank = 1 << 20;
  check_range("memory_bytes", o.memory_bytes, 0, std::int64_t{1} << 60);
  check_range("world_size", o.world_size, 1, kMostRank);
  check_range("batch_size", o.batch_size, 1, kMost);
  check_range("sequence_length", o.sequence_length, 1, kMost);
  check_range("lora_rank", o.lora_rank, 1, kMostRank);
  check_range("loss_chunk", o.loss_chunk, 0, kMost);
  if (!(o.lora_dropout >= 0 && o.lora_dropout < 1)) {
    bad("lora_dropout", std::to_string(o.lora_dropout), "a number from 0 to below 1");
  }
  if (!is_weight_dtype(o.lora_dtype)) {
    bad("lora_dtype", std::string(dtype_torch_name(o.lora_dtype)), "float32, float16 or bfloat16");
  }
  for (const std::string& target : o.lora_targets) {
    if (target.empty()) bad("lora_targets", "[\"\"]", "names of linear layers");
  }
}

namespace {

bool is_packed(const OutlineTensor& tensor) { return tensor.kind == OutlineTensor::Kind::kPacked; }

bool has_linears(const ModelOutline& model) {
  return std::any_of(model.tensors.begin(), model.tensors.end(), multiplies);
}

/// What a process may use of `memory`: on Apple hardware the system lives there too, on CUDA the
/// context and the blocks that an allocator cannot use.
std::int64_t usable_of(std::int64_t memory, Backend backend) {
  constexpr double kCudaShare = 0.95;
  const double share = backend == Backend::CUDA ? kCudaShare : usable_memory_share(backend);
  return static_cast<std::int64_t>(std::floor(static_cast<double>(memory) * share));
}

void add_notes(const ModelOutline& model, Plan& plan) {
  const auto& o = plan.options;
  for (const std::string& warning : plan.decision.warnings) plan.notes.push_back(warning);
  const bool fused = std::any_of(model.tensors.begin(), model.tensors.end(), [](const auto& t) {
    return t.shape.size() > 2 && t.kind == OutlineTensor::Kind::kDense;
  });
  if (fused) {
    plan.notes.emplace_back(
        "parameters of more than two dimensions (fused experts, convolutions) stay dense");
  }
  if (o.backend == Backend::CUDA) {
    plan.notes.emplace_back(
        "5 % of the memory are kept for the CUDA context and the allocator's fragments");
  } else if (o.backend != Backend::CPU) {
    plan.notes.emplace_back("65 % of the memory count: the system lives in it too");
  }
  if (o.mode == PlanMode::kInference && plan.sizes.blocks != 0) {
    plan.notes.emplace_back("forward: the whole sequence as one prompt, with its key-value cache");
  }
}

}  // namespace

Plan plan_config(const ModelOutline& model, const PlanOptions& options,
                 const std::optional<QuantizationConfig>& config, FileBytes* files) {
  Plan plan;
  plan.source = model.source;
  plan.options = options;
  QuantizationConfig asked;
  if (config) {
    asked = *config;
  } else {
    asked.method = QuantizationMethod::NONE;
  }
  plan.decision = decide_adapter(options.backend, asked, options.support, options.fallback);
  plan.notes = model.notes;
  plan.sizes = sizes_of(model, options, plan.decision.config.compute_dtype.value_or(DType::kF32),
                        plan.notes);
  add_layers(model, plan, files);
  add_phases(model, plan);
  plan.usable_bytes = usable_of(options.memory_bytes, options.backend);
  plan.fits = options.memory_bytes == 0 || plan.peak().total() <= plan.usable_bytes;
  return plan;
}

}  // namespace checkpoint

Plan plan(const ModelOutline& model, const PlanOptions& options) {
  using namespace checkpoint;
  check_plan_options(options);
  if (!has_linears(model)) {
    fail(Errc::kUnsupported, "plan: model '" + model.source + "' has " +
                                 std::to_string(model.tensors.size()) +
                                 " tensors, none of them the weight of a linear layer");
  }
  const bool packed = std::any_of(model.tensors.begin(), model.tensors.end(), is_packed);
  if (options.config && !options.config->custom_method.empty()) {
    fail(Errc::kUnsupported, "plan: method is '" + options.config->custom_method +
                                 "', an adapter of one's own, expected a method of quantal: nobody "
                                 "else knows its bytes");
  }
  FileBytes files;
  Plan plan = options.config || packed ? plan_config(model, options, options.config, &files)
                                       : recommend_plan(model, options);
  add_notes(model, plan);
  add_rules(model, plan);
  add_largest_batch(model, plan);
  return plan;
}

Plan plan(const std::string& path, const PlanOptions& options) {
  checkpoint::check_plan_options(options);
  return plan(outline_of(path), options);
}

}  // namespace quantal

// quantal plan: how much memory a model needs before any weight is read. Exact bytes of what is
// resident, bounds for what lives during a step, per rank and phase. docs/plan.md.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"
#include "quantal/kernels.h"
#include "quantal/policy.h"

namespace quantal {

// ------------------------------------------------------------------ the model

/// One tensor of a model whose bytes are not needed.
struct OutlineTensor {
  /// What a tensor is to the planner.
  enum class Kind : std::uint8_t {
    kLinear,  ///< weight of a linear layer: policy decides whether it is quantized
    kDense,   ///< any other parameter
    kBuffer,  ///< no parameter: FSDP keeps it whole on every rank
    kPacked,  ///< a layer that is quantized already
  };
  /// Full name of the tensor; for kPacked the module path of the layer.
  std::string name;
  Kind kind = Kind::kDense;           ///< how it is stored and what it is
  std::vector<std::int64_t> shape{};  ///< of the dense values
  DType dtype = DType::kF32;          ///< of the stored elements; kPacked: of the dense values
  std::optional<PackedSpec> spec{};   ///< kPacked
  std::int64_t stored_bytes = -1;     ///< as it lies there now; -1: elements times their size
  /// Name of an earlier kLinear that has the same weight: quantized once, held twice.
  std::string tied_to{};
  bool trainable = false;  ///< an adapter that the model has already
  bool saved = true;       ///< false: a buffer that no file holds
};

/// A model as the planner sees it: names, shapes and types.
struct ModelOutline {
  std::string source;                  ///< for people: "llama-7b (safetensors, 2 files)"
  std::string config_json = "{}";      ///< config.json of the model, where there is one
  std::vector<OutlineTensor> tensors;  ///< in the order of the files
  bool in_memory = false;  ///< a module: quantizing it begins with the dense model in memory
  std::vector<std::string> notes{};  ///< assumptions, for people
};

/// Outline of anything that load_checkpoint reads. Dense files: headers only. Quantized ones: the
/// small settings tensors too, and one layer of each form. 2-D weights that are no embeddings count
/// as linear layers. Throws what CheckpointReader::open throws.
ModelOutline outline_of(const std::string& path);

// ------------------------------------------------------------------ the question

/// What the memory is for.
enum class PlanMode : std::uint8_t { kInference, kQlora };
/// Two states of the adapters' size, or none.
enum class PlanOptimizer : std::uint8_t { kAdamW, kSgd };
/// How attention is computed: one keeps all scores.
enum class PlanAttention : std::uint8_t { kSdpa, kEager };
std::string_view plan_mode_name(PlanMode mode) noexcept;    ///< "inference", "qlora"
PlanMode parse_plan_mode(std::string_view name);            ///< throws Error{kConfig}
PlanOptimizer parse_plan_optimizer(std::string_view name);  ///< "adamw", "sgd"
PlanAttention parse_plan_attention(std::string_view name);  ///< "sdpa", "eager"

/// What is asked of the planner.
struct PlanOptions {
  Backend backend = Backend::CPU;  ///< where it is to run
  /// Memory of one rank in bytes; 0: not known, nothing is judged.
  std::int64_t memory_bytes = 0;
  std::int64_t world_size = 1;           ///< ranks of FSDP2; 1: no sharding
  PlanMode mode = PlanMode::kInference;  ///< what the memory is for
  /// Unset: the best that fits is recommended, or a quantized model is taken as it is.
  std::optional<QuantizationConfig> config{};
  std::optional<Support> support{};    ///< as decide_adapter
  std::optional<Fallback> fallback{};  ///< as decide_adapter

  std::int64_t batch_size = 1;          ///< sequences of one rank in one step
  std::int64_t sequence_length = 2048;  ///< inference: prompt and answer, for the key-value cache
  PlanAttention attention = PlanAttention::kSdpa;  ///< decides what a step keeps

  // Training only.
  std::int64_t lora_rank = 16;  ///< r of the LoRA pairs
  /// Last components of names, as PEFT's target_modules; empty: every linear layer but the head.
  std::vector<std::string> lora_targets{};
  double lora_dropout = 0;                          ///< rate; keeps a mask per pair
  DType lora_dtype = DType::kF32;                   ///< of the LoRA pairs
  PlanOptimizer optimizer = PlanOptimizer::kAdamW;  ///< decides what a step holds
  bool gradient_checkpointing = true;               ///< recompute blocks in backward
  std::int64_t loss_chunk = 0;  ///< tokens whose logits exist at a time; 0: the whole batch
  bool float32_norms = false;   ///< norms in float32, and with them the activations
  bool cpu_offload = false;     ///< FSDP2's CPUOffloadPolicy: shards live in host memory
};

// ------------------------------------------------------------------ the answer

/// One tensor or quantized layer of the planned model. Bytes are of the whole model unless the name
/// says rank; `rank` figures are those of rank 0, which holds the largest share.
struct PlanLayer {
  std::string name;    ///< module path or tensor
  std::string method;  ///< "hqq 4-bit g64", "mlx 4-bit, group 64 (as stored)", "dense bf16"
  std::string reason;  ///< why dense
  std::string unit;    ///< block that FSDP gathers it with: "model.layers.0"; empty: the root
  std::vector<std::int64_t> shape;           ///< of the dense values
  bool quantized = false;                    ///< packed in the planned model
  std::int64_t parameters = 0;               ///< of the dense values
  std::int64_t stored_bytes = 0;             ///< as it lies in the file or module now
  std::int64_t codes = 0;                    ///< bytes of a quantized layer
  std::int64_t stats = 0;                    ///< bytes of a quantized layer
  std::int64_t shared = 0;                   ///< bytes of a quantized layer
  std::int64_t bytes = 0;                    ///< resident, with the spec of the layer
  std::int64_t rank_bytes = 0;               ///< share of a rank
  std::int64_t file_bytes = 0;               ///< tensors in the default layout of its dialect
  std::int64_t adapter_parameters = 0;       ///< of the LoRA pair
  std::int64_t adapter_rank_parameters = 0;  ///< share of a rank
};

/// What makes up the memory of a phase.
enum class PlanPart : std::uint8_t {
  kBase,         ///< quantized layers
  kDense,        ///< everything else of the model
  kAdapters,     ///< LoRA pairs
  kGradients,    ///< of adapters
  kOptimizer,    ///< states, and temporaries of the step
  kGather,       ///< unsharded units and what gathers them
  kActivations,  ///< bound
  kCache,        ///< keys and values
  kLogits,       ///< bound: logits, loss and its gradient
  kWorkspace,    ///< decoded panels, or layers on their way in
};
inline constexpr std::size_t kNumPlanParts = 10;          ///< enumerators
std::string_view plan_part_name(PlanPart part) noexcept;  ///< "base", "dense" ...

/// Memory of one rank at the peak of a phase.
struct PlanPhase {
  std::string name;  ///< "load", "resident", "forward", "backward", "optimizer"
  std::array<std::int64_t, kNumPlanParts> bytes{};  ///< by PlanPart
  std::int64_t host_bytes = 0;                      ///< beside it, in host memory (cpu_offload)
  std::int64_t total() const;                       ///< sum of bytes
};

/// Weight bytes of the whole model beside the rule of thumb of the documentation.
struct PlanRule {
  std::string width;                      ///< "fp16", "int8", "int4", "int2"
  std::string method;                     ///< what was counted: "bnb_nf4 4-bit g64 double"
  double bytes_per_parameter = 0;         ///< of the rule: 2, 1, 0.5, 0.25
  std::int64_t exact_bytes = 0;           ///< of the model, what stays dense in 16 bits
  std::int64_t quantized_parameters = 0;  ///< of its quantized layers
  std::int64_t quantized_bytes = 0;       ///< of its quantized layers
  double rule_gigabytes = 0;  ///< bytes_per_parameter x parameters, rounded to whole billions
};

/// A config that was weighed for a recommendation.
struct PlanCandidate {
  QuantizationConfig config;        ///< as it was weighed
  std::string label;                ///< as Plan::label
  double relative_error = 0;        ///< of normally distributed weights
  std::int64_t resident_bytes = 0;  ///< per rank
  std::int64_t peak_bytes = 0;      ///< per rank
  bool fits = false;                ///< peak <= usable memory
};

/// Sizes behind the bounds; 0 = unknown.
struct PlanSizes {
  std::int64_t hidden = 0;               ///< width of the residual stream
  std::int64_t vocabulary = 0;           ///< rows of the head
  std::int64_t blocks = 0;               ///< decoder blocks
  std::int64_t heads = 0;                ///< of queries
  std::int64_t query = 0;                ///< rows of q_proj
  std::int64_t key_value = 0;            ///< rows of k_proj and v_proj together
  std::int64_t widest = 0;               ///< rows of the widest layer of a block
  DType activation_dtype = DType::kF32;  ///< of the residual stream
  DType compute_dtype = DType::kF32;     ///< of products
};

/// What a model needs, rank by rank and phase by phase.
struct Plan {
  std::string source;                     ///< of the outline
  PlanOptions options;                    ///< as asked
  Decision decision;                      ///< what policy made of the config
  bool recommended = false;               ///< the config is the planner's own choice
  bool fits = true;                       ///< peak <= usable memory, or memory unknown
  std::int64_t usable_bytes = 0;          ///< of options.memory_bytes; 0: unknown
  std::int64_t largest_batch = 0;         ///< sequences of a rank that fit; 0: none, or unknown
  std::vector<PlanLayer> layers;          ///< in the order of the outline
  std::vector<PlanPhase> phases;          ///< in the order of the run
  std::vector<PlanRule> rules;            ///< beside the document's figures
  std::vector<PlanCandidate> candidates;  ///< best first; empty unless recommended
  std::vector<std::string> unmatched_patterns;  ///< LayerRules::unmatched
  std::vector<std::string> notes;               ///< assumptions, and what the figures do not cover
  PlanSizes sizes;                              ///< behind the bounds

  std::int64_t parameters = 0;          ///< of the model
  std::int64_t adapter_parameters = 0;  ///< of all LoRA pairs
  std::int64_t stored_bytes = 0;        ///< as it lies there now
  std::int64_t resident_bytes = 0;      ///< weights of the planned model
  std::int64_t rank_bytes = 0;          ///< share of a rank
  std::int64_t file_bytes = 0;          ///< saved in the default layout

  const PlanPhase& peak() const;  ///< the largest phase
  std::string label() const;      ///< "hqq 4-bit g64", "as stored", "none"
  /// Report for a terminal, at most 100 columns.
  std::string to_text() const;
  std::string to_json() const;  ///< everything, as an object
};

/// Bytes of the 16 integers that a layer keeps beside its codes.
inline constexpr std::int64_t kSpecBytes = 8 * static_cast<std::int64_t>(kSpecInts);

/// Plans without touching any weight. Thread-safe.
///
/// Throws Error{kConfig} naming option, value and what is legal; what outline_of, decide_adapter
/// and LayerRules throw; Error{kShape} for sizes that overflow.
Plan plan(const ModelOutline& model, const PlanOptions& options);
/// The same for outline_of(path).
Plan plan(const std::string& path, const PlanOptions& options);

}  // namespace quantal

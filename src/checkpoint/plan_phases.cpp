// Memory of one rank, phase by phase. docs/plan.md has the same sums as formulas.
#include <algorithm>
#include <map>

#include "checkpoint/plan_parts.h"
#include "kernels/panels.h"

namespace quantal::checkpoint {
namespace {

using Kind = OutlineTensor::Kind;

std::int64_t times(std::int64_t a, std::int64_t b) {
  return checked_mul(a, b, "plan: bytes of a phase");
}
std::int64_t plus(std::int64_t a, std::int64_t b) {
  return checked_add(a, b, "plan: bytes of a phase");
}
void add(std::int64_t& sum, std::int64_t bytes) { sum = plus(sum, bytes); }

std::int64_t& part(PlanPhase& phase, PlanPart which) {
  return phase.bytes[static_cast<std::size_t>(which)];
}

/// What a unit of FSDP puts together from all ranks.
struct Unit {
  std::int64_t bytes = 0;          ///< of all its parameters
  std::int64_t adapter_bytes = 0;  ///< of those that train
};

/// Sums over the rows of a plan.
struct Sums {
  std::int64_t base = 0, dense = 0, adapters = 0;  ///< of a rank
  std::int64_t replicated = 0;                     ///< of base and dense, not sharded
  std::int64_t whole_base = 0, whole_dense = 0;    ///< of the whole model
  std::int64_t largest_stored = 0, largest_packed = 0, largest_adapter = 0;
  std::int64_t panel = 0;  ///< decoded weights that a product holds
  Unit root, block;        ///< of the units, the root and the largest other one
};

/// Bytes of decoded weights: panels on the CPU, a whole layer elsewhere.
std::int64_t panel_bytes(const Plan& plan, const PlanLayer& row) {
  const std::int64_t element = size_of(plan.sizes.compute_dtype);
  const std::int64_t rows = row.shape[0], cols = row.shape[1];
  if (plan.options.backend != Backend::CPU) return times(times(rows, cols), element);
  const std::int64_t forward =
      std::max(kPanelBytes, times(times(std::min(kMinPanelRows, rows), cols), element));
  const std::int64_t backward =
      std::max(kPanelBytes, times(times(rows, std::min(kMinPanelCols, cols)), element));
  return plan.options.mode == PlanMode::kQlora ? std::max(forward, backward) : forward;
}

Sums sum_rows(const ModelOutline& model, const Plan& plan) {
  Sums sums;
  std::map<std::string, Unit> units;
  const std::int64_t lora = size_of(plan.options.lora_dtype);
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const PlanLayer& row = plan.layers[i];
    const OutlineTensor& tensor = model.tensors[i];
    Unit& unit = units[row.unit];
    if (tensor.trainable) {
      add(sums.adapters, row.rank_bytes);
      add(unit.bytes, row.bytes);
      add(unit.adapter_bytes, row.bytes);
      sums.largest_adapter = std::max(sums.largest_adapter, row.rank_bytes);
      continue;
    }
    const std::int64_t whole = tensor.kind == Kind::kBuffer ? row.bytes
                               : row.quantized              ? row.bytes - row.codes - row.stats
                                                            : 0;
    add(row.quantized ? sums.base : sums.dense, row.rank_bytes);
    add(row.quantized ? sums.whole_base : sums.whole_dense, row.bytes);
    add(sums.replicated, whole);
    add(unit.bytes, row.bytes - whole);
    sums.largest_stored = std::max(sums.largest_stored, row.stored_bytes);
    if (row.quantized) {
      sums.largest_packed = std::max(sums.largest_packed, row.bytes);
      sums.panel = std::max(sums.panel, panel_bytes(plan, row));
    }
    const std::int64_t adapter = times(row.adapter_parameters, lora);
    add(sums.adapters, times(row.adapter_rank_parameters, lora));
    add(unit.bytes, adapter);
    add(unit.adapter_bytes, adapter);
    sums.largest_adapter = std::max(sums.largest_adapter, times(row.adapter_rank_parameters, lora));
  }
  for (const auto& [name, unit] : units) {
    if (name.empty()) {
      sums.root = unit;
    } else if (unit.bytes > sums.block.bytes) {
      sums.block = unit;
    }
  }
  return sums;
}

class Phases {
 public:
  Phases(const ModelOutline& model, Plan& plan)
      : plan_(plan),
        o_(plan.options),
        sums_(sum_rows(model, plan)),
        activations_(activation_bytes(model, plan)),
        in_memory_(model.in_memory),
        trains_(o_.mode == PlanMode::kQlora),
        sharded_(o_.world_size > 1 || o_.cpu_offload) {}

  void run() {
    plan_.phases = {load(), resident("resident")};
    PlanPhase forward = resident("forward");
    part(forward, PlanPart::kGather) = gather();
    part(forward, PlanPart::kActivations) = activations_.forward;
    part(forward, PlanPart::kLogits) = activations_.forward_logits;
    part(forward, PlanPart::kCache) = activations_.cache;
    part(forward, PlanPart::kWorkspace) = sums_.panel;
    plan_.phases.push_back(forward);
    if (trains_) add_training();
  }

 private:
  /// Between steps. With cpu_offload the shards lie in host memory; what is not sharded does not.
  PlanPhase resident(const char* name) const {
    PlanPhase phase;
    phase.name = name;
    part(phase, PlanPart::kBase) = sums_.base;
    part(phase, PlanPart::kDense) = sums_.dense;
    if (trains_) {
      part(phase, PlanPart::kAdapters) = sums_.adapters;
      part(phase, PlanPart::kOptimizer) = optimizer_states();
    }
    if (!o_.cpu_offload) return phase;
    phase.host_bytes = phase.total() - sums_.replicated;
    phase.bytes = {};
    part(phase, PlanPart::kBase) = sums_.replicated;
    return phase;
  }

  std::int64_t optimizer_states() const {
    return o_.optimizer == PlanOptimizer::kAdamW ? 2 * sums_.adapters : 0;
  }

  /// A module is quantized in place, layer by layer. Files are read packed, or converted tensor by
  /// tensor first; the model lies whole in memory before it is sharded.
  PlanPhase load() const {
    PlanPhase phase;
    phase.name = "load";
    if (in_memory_) {
      part(phase, PlanPart::kDense) = plan_.stored_bytes;
      part(phase, PlanPart::kWorkspace) = plus(sums_.largest_packed, sums_.largest_stored);
      return phase;
    }
    part(phase, PlanPart::kBase) = sums_.whole_base;
    part(phase, PlanPart::kDense) = sums_.whole_dense;
    part(phase, PlanPart::kWorkspace) = sums_.largest_stored;
    if (o_.backend != Backend::CUDA && !o_.cpu_offload) return phase;
    PlanPhase device = resident("load");
    part(device, PlanPart::kAdapters) = part(device, PlanPart::kOptimizer) = 0;
    device.host_bytes = phase.total();
    return device;
  }

  /// The root unit stays whole through a step. Of the blocks one is in use, the next has arrived in
  /// one buffer and is taken apart into its parameters.
  std::int64_t gather() const {
    if (!sharded_) return 0;
    return std::max(2 * sums_.root.bytes, plus(sums_.root.bytes, times(3, sums_.block.bytes)));
  }

  void add_training() {
    PlanPhase backward = resident("backward");
    std::int64_t gradients = sums_.adapters;
    if (sharded_) {  // of a block: whole, and in the buffer that is reduced
      add(gradients, times(3, std::max(sums_.block.adapter_bytes, sums_.root.adapter_bytes)));
    }
    part(backward, PlanPart::kGradients) = gradients;
    part(backward, PlanPart::kGather) = gather();
    part(backward, PlanPart::kActivations) = activations_.backward;
    part(backward, PlanPart::kLogits) = activations_.backward_logits;
    part(backward, PlanPart::kWorkspace) = sums_.panel;
    plan_.phases.push_back(backward);

    PlanPhase step = resident("optimizer");
    const std::int64_t temporaries = step_temporaries();
    if (o_.cpu_offload) {
      add(step.host_bytes, plus(sums_.adapters, temporaries));
    } else {
      part(step, PlanPart::kGradients) = sums_.adapters;
      add(part(step, PlanPart::kOptimizer), temporaries);
      part(step, PlanPart::kWorkspace) = o_.backend == Backend::CPU ? sums_.panel : 0;
    }
    plan_.phases.push_back(step);
  }

  /// On CUDA the optimizer goes through all adapters at once, elsewhere one after the other.
  std::int64_t step_temporaries() const {
    const bool adamw = o_.optimizer == PlanOptimizer::kAdamW;
    if (o_.backend == Backend::CUDA && !o_.cpu_offload) {
      return times(adamw ? 2 : 1, sums_.adapters);
    }
    return times(adamw ? 3 : 1, sums_.largest_adapter);
  }

  Plan& plan_;
  const PlanOptions& o_;
  Sums sums_;
  ActivationBytes activations_;
  bool in_memory_, trains_, sharded_;
};

bool fits_with_batch(const ModelOutline& model, const Plan& plan, std::int64_t batch) {
  Plan trial;
  trial.options = plan.options;
  trial.options.batch_size = batch;
  trial.layers = plan.layers;
  trial.sizes = plan.sizes;
  trial.stored_bytes = plan.stored_bytes;
  add_phases(model, trial);
  return trial.peak().total() <= plan.usable_bytes;
}

}  // namespace

void add_phases(const ModelOutline& model, Plan& plan) { Phases(model, plan).run(); }

void add_largest_batch(const ModelOutline& model, Plan& plan) {
  constexpr std::int64_t kMost = 1 << 16;
  if (plan.usable_bytes == 0 || plan.sizes.blocks == 0 || !fits_with_batch(model, plan, 1)) return;
  std::int64_t low = 1, high = 2;
  while (high <= kMost && fits_with_batch(model, plan, high)) low = high, high *= 2;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits_with_batch(model, plan, middle) ? low : high) = middle;
  }
  plan.largest_batch = low;
}

}  // namespace quantal::checkpoint

// Bounds of what lives beside the weights during a step. docs/plan.md derives each term; tests
// compare them with the allocations of real steps.
#include <algorithm>
#include <map>
#include <set>

#include "checkpoint/json.h"
#include "checkpoint/plan_parts.h"

namespace quantal::checkpoint {
namespace {

constexpr std::int64_t kFloat = 4;

std::int64_t times(std::int64_t a, std::int64_t b) {
  return checked_mul(a, b, "plan: bytes of activations");
}
std::int64_t plus(std::int64_t a, std::int64_t b) {
  return checked_add(a, b, "plan: bytes of activations");
}

/// Experts that a token passes, of how many: {1, 1} for layers that are no experts.
struct Experts {
  std::int64_t used = 1, all = 1;
  std::int64_t share(std::int64_t n) const { return ceil_div(times(n, used), all); }
};

/// A LoRA pair of a layer; rank 0: none.
struct Adapter {
  std::string module;  ///< the layer that it adapts
  std::int64_t rank = 0;
  DType dtype = DType::kF32;
};

/// Layers of one block, per token.
struct Block {
  std::int64_t outs = 0;                                 ///< rows of all layers
  std::int64_t lora_inputs = 0;                          ///< bytes of what adapters keep
  std::map<std::string, std::set<std::string>> experts;  ///< parent of numbers: its numbers
};

/// "model.layers.3.mlp.experts" and "7" of "model.layers.3.mlp.experts.7.w1"; empty without a
/// second number.
std::pair<std::string, std::string> expert_of(const std::string& module) {
  const std::string unit = unit_of(module);
  if (unit.empty() || unit.size() >= module.size()) return {};
  const std::string inner = unit_of(module.substr(unit.size() + 1));
  if (inner.empty()) return {};
  const std::size_t dot = inner.rfind('.');
  if (dot == std::string::npos) return {unit, inner};
  return {unit + "." + inner.substr(0, dot), inner.substr(dot + 1)};
}

class Bounds {
 public:
  Bounds(const ModelOutline& model, const Plan& plan)
      : model_(model), plan_(plan), o_(plan.options), s_(plan.sizes) {
    e_ = size_of(s_.activation_dtype);
    wide_ = std::max(e_, kFloat);
    const Json config = parse_json_object(model.config_json, "config.json");
    const auto used = config.find("num_experts_per_tok");
    if (used != config.end() && used->is_number_integer()) per_token_ = used->get<std::int64_t>();
    tokens_ = times(o_.batch_size, o_.sequence_length);
  }

  ActivationBytes run() {
    if (s_.blocks == 0) return {};
    return o_.mode == PlanMode::kQlora ? training() : inference();
  }

 private:
  /// Experts among the layers of a block count with the share that a token passes.
  Experts experts_of(const Block& block, const std::string& module) const {
    const auto [parent, number] = expert_of(module);
    const auto found = block.experts.find(parent);
    if (parent.empty() || found == block.experts.end()) return {};
    const auto all = std::max<std::int64_t>(1, std::ssize(found->second));
    return {per_token_ > 0 ? std::min(per_token_, all) : all, all};
  }

  /// Adapters are added in one step, which reads what it is given (quantal/low_rank.h).
  bool one_step() const { return o_.backend == Backend::CPU; }

  /// What an adapter keeps of its input. In the adapter's dtype the layers of one module share it;
  /// another one is converted for each, but on the CPU; dropout keeps its result and its mask.
  std::int64_t input_bytes(std::int64_t in, DType dtype, bool shared) const {
    const std::int64_t f = one_step() ? e_ : size_of(dtype);
    if (o_.lora_dropout > 0) return times(in, 2 * f);
    if (f != e_) return times(in, f);
    return shared ? 0 : times(in, e_);
  }

  /// Planned for a layer, or PEFT's "a.q_proj.lora_A.default.weight" [rank, in].
  Adapter adapter_of(const OutlineTensor& tensor, const PlanLayer& row) const {
    if (!tensor.trainable) {
      const std::int64_t rank = row.adapter_parameters == 0 ? 0 : o_.lora_rank;
      return {module_name(tensor), rank, o_.lora_dtype};
    }
    const std::size_t at = tensor.name.find(".lora_A.");
    if (at == std::string::npos) return {};
    return {tensor.name.substr(0, at), tensor.shape[0], tensor.dtype};
  }

  /// The largest block of the model.
  std::int64_t saved_per_token() const {
    std::map<std::string, Block> blocks;
    for (const OutlineTensor& tensor : model_.tensors) {
      const auto [parent, number] = expert_of(module_name(tensor));
      if (!parent.empty()) blocks[unit_of(tensor.name)].experts[parent].insert(number);
    }
    std::set<std::string> inputs;  // of adapters, by parent module and width
    for (std::size_t i = 0; i < model_.tensors.size(); ++i) {
      const OutlineTensor& tensor = model_.tensors[i];
      const std::string unit = unit_of(tensor.name);
      if (unit.empty() || tensor.shape.size() != 2) continue;
      Block& block = blocks[unit];
      const std::string module = module_name(tensor);
      if (multiplies(tensor)) {
        block.outs = plus(block.outs, experts_of(block, module).share(tensor.shape[0]));
      }
      const Adapter adapter = adapter_of(tensor, plan_.layers[i]);
      if (adapter.rank == 0) continue;
      const std::string parent = adapter.module.substr(0, adapter.module.rfind('.'));
      const bool seen = !inputs.insert(parent + " " + std::to_string(tensor.shape[1])).second;
      const std::int64_t kept =
          plus(input_bytes(tensor.shape[1], adapter.dtype, seen),
               times(adapter.rank, one_step() ? kFloat : size_of(adapter.dtype)));
      block.lora_inputs = plus(block.lora_inputs, experts_of(block, adapter.module).share(kept));
    }
    std::int64_t most = 0;
    for (const auto& [unit, block] : blocks) {
      most = std::max(most, plus(times(block.outs, e_), block.lora_inputs));
    }
    // Two norms in float32, the result of attention, the activated gate, keys and values repeated
    // for every query head.
    const std::int64_t repeated = std::max<std::int64_t>(0, 2 * s_.query - s_.key_value);
    const std::int64_t rest = 2 * s_.hidden * wide_ + (s_.query + s_.widest + repeated) * e_;
    return plus(plus(most, rest), scores_per_token(kFloat + (e_ < kFloat ? e_ : 0)));
  }

  /// Attention scores where they exist (eager), and the mask.
  std::int64_t scores_per_token(std::int64_t element) const {
    const std::int64_t mask = times(o_.sequence_length, e_);
    if (o_.attention == PlanAttention::kSdpa) return mask;
    return plus(mask, times(times(s_.heads, o_.sequence_length), element));
  }

  /// A score before softmax and after it, which computes in float32.
  std::int64_t softmax_bytes() const { return 2 * kFloat + (e_ < kFloat ? e_ : 0); }

  std::int64_t cast_per_token() const {
    return s_.compute_dtype == s_.activation_dtype ? 0 : 2 * s_.widest * size_of(s_.compute_dtype);
  }

  ActivationBytes training() const {
    const std::int64_t saved = saved_per_token();
    const std::int64_t passing =
        plus(cast_per_token(),
             o_.attention == PlanAttention::kSdpa ? 0 : scores_per_token(softmax_bytes()));
    const std::int64_t forward_pass = plus((4 * s_.widest + 3 * s_.hidden) * wide_, passing);
    const std::int64_t backward_pass = plus((3 * s_.widest + 2 * s_.hidden) * wide_, passing);
    // Inputs of the blocks, the embeddings and their gradient.
    const std::int64_t kept = o_.gradient_checkpointing
                                  ? times(s_.blocks + 2, s_.hidden * e_)
                                  : plus(times(s_.blocks, saved), 3 * s_.hidden * wide_);
    const std::int64_t chunk = o_.loss_chunk == 0 ? tokens_ : std::min(tokens_, o_.loss_chunk);
    const std::int64_t logits = times(chunk, times(s_.vocabulary, e_));
    const std::int64_t loss = times(chunk, times(s_.vocabulary, kFloat));
    ActivationBytes out;
    choose(times(tokens_, kept), times(tokens_, forward_pass), 0, plus(logits, 2 * loss),
           out.forward, out.forward_logits);
    const std::int64_t recomputed = o_.gradient_checkpointing ? saved : 0;
    choose(times(tokens_, kept), times(tokens_, plus(recomputed, backward_pass)),
           o_.loss_chunk == 0 ? logits : 0, plus(logits, 3 * loss), out.backward,
           out.backward_logits);
    return out;
  }

  /// The larger of two moments: inside a block, with `held` of the logits, or at the loss.
  static void choose(std::int64_t kept, std::int64_t block, std::int64_t held, std::int64_t loss,
                     std::int64_t& activations, std::int64_t& logits) {
    const bool at_loss = loss > plus(block, held);
    activations = at_loss ? kept : plus(kept, block);
    logits = at_loss ? loss : held;
  }

  /// A prompt of the whole length at once; logits of its last token.
  ActivationBytes inference() const {
    ActivationBytes out;
    const std::int64_t token =
        s_.hidden * (2 * e_ + 2 * kFloat) +
        std::max(4 * s_.widest, s_.hidden + 3 * s_.query + 2 * s_.key_value) * e_;
    const std::int64_t scores = scores_per_token(softmax_bytes());
    out.forward = times(tokens_, plus(plus(token, cast_per_token()), scores));
    out.forward_logits = times(o_.batch_size, times(s_.vocabulary, e_ + kFloat));
    out.cache = times(tokens_, times(s_.blocks, times(s_.key_value, e_)));
    return out;
  }

  const ModelOutline& model_;
  const Plan& plan_;
  const PlanOptions& o_;
  const PlanSizes& s_;
  std::int64_t e_ = 0, wide_ = 0, tokens_ = 0, per_token_ = 0;
};

}  // namespace

ActivationBytes activation_bytes(const ModelOutline& model, const Plan& plan) {
  return Bounds(model, plan).run();
}

}  // namespace quantal::checkpoint

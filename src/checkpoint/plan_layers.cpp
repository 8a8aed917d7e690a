// Which form each layer gets, and the exact bytes of it.
#include <algorithm>
#include <set>

#include "checkpoint/plan_parts.h"
#include "quantal/transcode.h"

namespace quantal::checkpoint {
namespace {

using Kind = OutlineTensor::Kind;

std::string dense_label(const OutlineTensor& tensor) {
  return "dense " + std::string(dtype_name(tensor.dtype));
}

bool is_norm(const OutlineTensor& tensor) {
  const std::string module = module_name(tensor);
  const std::string_view last = last_part(module);
  return tensor.shape.size() == 1 && tensor.kind == Kind::kDense &&
         (last.find("norm") != std::string_view::npos || last.starts_with("ln_"));
}

/// A name matches a target as in PEFT: the whole name or its end after a dot.
bool is_target(const std::string& name, const std::string& target) {
  return name == target || name.ends_with("." + target);
}

/// Rows of a plan, tensor by tensor.
class Builder {
 public:
  Builder(const ModelOutline& model, Plan& plan, FileBytes* files)
      : model_(model),
        plan_(plan),
        files_(files),
        rules_(plan.decision.config),
        quantizes_(plan.decision.config.method != QuantizationMethod::NONE ||
                   !plan.decision.config.layer_configs.empty()),
        ranks_(plan.options.world_size) {}

  void run() {
    for (const OutlineTensor& tensor : model_.tensors) {
      PlanLayer row = row_of(tensor);
      add_adapter(tensor, row);
      if (!tensor.saved || !tensor.tied_to.empty()) {
        row.file_bytes = 0;
      } else if (files_ != nullptr && !row.quantized) {
        row.file_bytes = row.bytes;
      }
      sum(tensor, row);
      plan_.layers.push_back(std::move(row));
    }
    for (const std::string& target : plan_.options.lora_targets) {
      if (plan_.options.mode != PlanMode::kQlora || matched_.count(target) != 0) continue;
      fail(Errc::kConfig, "plan: lora target \"" + target + "\" matches no linear layer");
    }
    if (!as_stored()) plan_.unmatched_patterns = rules_.unmatched();
  }

 private:
  bool as_stored() const { return !quantizes_ || plan_.decision.adapter.empty(); }

  PlanLayer row_of(const OutlineTensor& tensor) {
    PlanLayer row;
    row.name = tensor.kind == Kind::kPacked || tensor.kind == Kind::kLinear ? module_name(tensor)
                                                                            : tensor.name;
    row.unit = unit_of(tensor.name);
    row.shape = tensor.shape;
    const bool counts = tensor.tied_to.empty() && tensor.kind != Kind::kBuffer;
    row.parameters = counts ? numel_of(tensor) : 0;
    row.stored_bytes = tensor.tied_to.empty() ? bytes_of(tensor) : 0;
    if (tensor.kind == Kind::kPacked) {
      packed_row(tensor, row);
    } else if (tensor.kind == Kind::kLinear) {
      linear_row(tensor, row);
    } else {
      dense_row(tensor, row,
                tensor.shape.size() > 2 ? "parameter of " + std::to_string(tensor.shape.size()) +
                                              " dimensions, not a linear layer"
                                        : "not a linear layer");
    }
    return row;
  }

  /// Quantized already: as it is, or turned into the form that the config asks for.
  void packed_row(const OutlineTensor& tensor, PlanLayer& row) {
    const PackedSpec& stored = *tensor.spec;
    row.method = describe_form(stored) + " (as stored)";
    row.file_bytes = row.stored_bytes;
    if (as_stored() || model_.in_memory || is_lookup(tensor) || !tensor.tied_to.empty()) {
      return quantized_row(tensor, stored, row);
    }
    const auto choice = rules_.choose(row.name, stored.rows, stored.cols);
    if (!choice.quantize) return quantized_row(tensor, stored, row);
    const Dialect& dialect = dialect_of(choice.options.method);
    TranscodeTarget target{&dialect, choice.options, false};
    if (dialect.keeps_weight_dtype) target.options.value_dtype = stored.value_dtype;
    row.method = describe_options(choice.options);
    row.file_bytes = 0;
    quantized_row(tensor, transcoded_spec(stored, target), row);
  }

  void linear_row(const OutlineTensor& tensor, PlanLayer& row) {
    if (as_stored()) {
      return dense_row(tensor, row,
                       plan_.decision.substitutions.empty()
                           ? "method is none"
                           : plan_.decision.substitutions.front().reason);
    }
    if (!tensor.tied_to.empty()) return tied_row(tensor, row);
    auto choice = rules_.choose(row.name, tensor.shape[0], tensor.shape[1]);
    if (choice.quantize && !is_weight_dtype(tensor.dtype)) {
      choice.quantize = false;
      choice.reason =
          "stored as " + std::string(dtype_name(tensor.dtype)) + ", expected f32, f16 or bf16";
    }
    if (!choice.quantize) return dense_row(tensor, row, choice.reason);
    const Dialect& dialect = dialect_of(choice.options.method);
    if (dialect.keeps_weight_dtype) choice.options.value_dtype = tensor.dtype;
    row.method = describe_options(choice.options);
    quantized_.insert(tensor.name);
    quantized_row(tensor, dialect.make_spec(tensor.shape[0], tensor.shape[1], choice.options), row);
  }

  /// The same weight under a second name: it shares codes and statistics with the first.
  void tied_row(const OutlineTensor& tensor, PlanLayer& row) {
    row.method = "tied";
    row.reason = "shares its weight with " + tensor.tied_to;
    row.quantized = quantized_.count(tensor.tied_to) != 0;
    row.bytes = row.rank_bytes = row.quantized ? kSpecBytes : 0;
  }

  void quantized_row(const OutlineTensor& tensor, const PackedSpec& spec, PlanLayer& row) {
    row.quantized = true;
    if (!tensor.tied_to.empty()) {
      row.method = "tied";
      row.reason = "shares its weight with " + tensor.tied_to;
      row.bytes = row.rank_bytes = kSpecBytes;
      return;
    }
    const PackedLayout layout = layout_of(spec);
    row.codes = spec.rows * layout.code_bytes;
    row.stats = layout.stat_rows * layout.stat_bytes;
    row.shared = layout.shared_bytes;
    row.bytes = row.codes + row.stats + row.shared + kSpecBytes;
    row.rank_bytes = share_of(spec.rows, layout.code_bytes, ranks_) +
                     share_of(layout.stat_rows, layout.stat_bytes, ranks_) + row.shared +
                     kSpecBytes;
    if (files_ != nullptr && row.file_bytes == 0) row.file_bytes = files_->of(spec);
  }

  void dense_row(const OutlineTensor& tensor, PlanLayer& row, const std::string& reason) {
    row.method = dense_label(tensor);
    row.reason = reason;
    if (!tensor.tied_to.empty()) return;
    DType dtype = tensor.dtype;
    if (plan_.options.float32_norms && plan_.options.mode == PlanMode::kQlora && is_norm(tensor) &&
        is_weight_dtype(dtype)) {
      dtype = DType::kF32;
      row.method = "dense f32";
    }
    row.bytes = checked_mul(numel_of(tensor), size_of(dtype), "plan: bytes of " + tensor.name);
    const bool whole = tensor.kind == Kind::kBuffer || tensor.shape.empty();
    row.rank_bytes = row.bytes;
    if (whole || row.bytes == 0) return;
    row.rank_bytes = share_of(tensor.shape[0], row.bytes / tensor.shape[0], ranks_);
  }

  /// The head is what no block holds and whose rows are the vocabulary; PEFT's "all-linear" leaves
  /// it out.
  bool is_head(const PlanLayer& row) const {
    if (!row.unit.empty()) return false;
    const std::string_view last = last_part(row.name);
    return last == "lm_head" ||
           (plan_.sizes.vocabulary != 0 && row.shape[0] == plan_.sizes.vocabulary);
  }

  bool targeted(const PlanLayer& row) {
    const auto& targets = plan_.options.lora_targets;
    if (targets.empty()) return !is_head(row);
    bool any = false;
    for (const std::string& target : targets) {
      if (!is_target(row.name, target)) continue;
      matched_.insert(target);
      any = true;
    }
    return any;
  }

  void add_adapter(const OutlineTensor& tensor, PlanLayer& row) {
    if (plan_.options.mode != PlanMode::kQlora || has_adapters()) return;
    if (!multiplies(tensor) || !targeted(row)) return;
    const std::int64_t rank = plan_.options.lora_rank;
    const std::int64_t out = row.shape[0], in = row.shape[1];
    row.adapter_parameters = checked_mul(rank, checked_add(in, out, "plan: lora"), "plan: lora");
    row.adapter_rank_parameters = share_of(rank, in, ranks_) + share_of(out, rank, ranks_);
  }

  bool has_adapters() const {
    return std::any_of(model_.tensors.begin(), model_.tensors.end(),
                       [](const OutlineTensor& t) { return t.trainable; });
  }

  /// A model that carries adapters: they are the ones that train.
  void sum(const OutlineTensor& tensor, PlanLayer& row) {
    if (tensor.trainable) {
      row.adapter_parameters = numel_of(tensor);
      row.adapter_rank_parameters = row.rank_bytes / size_of(tensor.dtype);
    }
    plan_.parameters =
        checked_add(plan_.parameters, tensor.trainable ? 0 : row.parameters, "plan: parameters");
    plan_.adapter_parameters =
        checked_add(plan_.adapter_parameters, row.adapter_parameters, "plan: parameters");
    plan_.stored_bytes = checked_add(plan_.stored_bytes, row.stored_bytes, "plan: bytes");
    plan_.resident_bytes = checked_add(plan_.resident_bytes, row.bytes, "plan: bytes");
    plan_.rank_bytes = checked_add(plan_.rank_bytes, row.rank_bytes, "plan: bytes");
    plan_.file_bytes = checked_add(plan_.file_bytes, row.file_bytes, "plan: bytes");
  }

  const ModelOutline& model_;
  Plan& plan_;
  FileBytes* files_;
  LayerRules rules_;
  bool quantizes_;
  std::int64_t ranks_;
  std::set<std::string> quantized_, matched_;
};

}  // namespace

std::int64_t share_of(std::int64_t rows, std::int64_t row_bytes, std::int64_t ranks) {
  return checked_mul(ceil_div(rows, ranks), row_bytes, "plan: bytes of a share");
}

void add_layers(const ModelOutline& model, Plan& plan, FileBytes* files) {
  Builder(model, plan, files).run();
}

}  // namespace quantal::checkpoint

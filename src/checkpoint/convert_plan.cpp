#include "checkpoint/convert_plan.h"

#include <algorithm>
#include <array>

#include "checkpoint/json.h"
#include "checkpoint/model_writer.h"
#include "quantal/policy.h"

namespace quantal {
namespace checkpoint {
namespace {

/// The name of a dense form: "bf16".
std::string dense_name(DType dtype) { return std::string(dtype_name(dtype)); }

/// All settings as the source has them: a layer of the same dialect needs no change.
bool follows_source(const ConvertOptions& options) {
  const QuantizeOptions& o = options.quantize;
  return o.bits == 0 && o.group_size == 0 && o.mode.empty() && o.quant_type.empty() &&
         !options.value_dtype;
}

/// The method of a dialect that has this width.
QuantizationMethod method_for(const Dialect& dialect, int bits, QuantizationMethod asked) {
  const auto fits = [bits](QuantizationMethod m) { return method_bits(m).value_or(bits) == bits; };
  const auto& all = dialect.methods;
  if (std::find(all.begin(), all.end(), asked) != all.end() && fits(asked)) return asked;
  const auto found = std::find_if(all.begin(), all.end(), fits);
  return found == all.end() ? QuantizationMethod::NONE : *found;
}

/// What transformers calls the dtype of the model, if it is one of weights.
std::optional<DType> declared_dtype(const Json& config) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_string()) continue;
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      if (found->get<std::string>() == dtype_torch_name(dtype)) return dtype;
    }
  }
  return std::nullopt;
}

/// Plans for one source and one target.
class Planner {
 public:
  Planner(const ModelReader& reader, const Dialect* target, const ConvertOptions& options)
      : reader_(reader),
        target_(target),
        options_(options),
        model_dtype_(declared_dtype(parse_json_object(reader.config_json(), "config.json"))) {
    for (const std::string& skip : options.skip_modules) {
      skips_.emplace_back(skip, NamePattern::Plain::kAnywhere);
    }
  }

  std::vector<Step> run() {
    std::vector<Step> steps;
    for (const std::string& name : reader_.layer_names()) {
      steps.push_back(plan_layer(name));
      refuse_loss(steps.back());
    }
    const bool dense_source = reader_.layer_names().empty();
    for (const std::string& name : reader_.tensor_names()) {
      steps.push_back(dense_source && target_ != nullptr ? plan_weight(name) : copy(name));
      refuse_loss(steps.back());
    }
    if (dense_source && refusal_ && quantized_ == 0) throw *refusal_;
    return steps;
  }

 private:
  Step copy(const std::string& name) const {
    Step step;
    step.name = name;
    return step;
  }

  Step plan_layer(const std::string& name) {
    Step step;
    step.name = step.module = name;
    step.from = reader_.layer_spec(name);
    step.report.name = name;
    step.report.from = describe_form(*step.from);
    const bool decode =
        target_ == nullptr || (is_embedding(name) && !target_->quantizes_embeddings);
    if (decode) {
      step.action = Action::kDecode;
      step.dense_dtype =
          options_.dense_dtype.value_or(model_dtype_.value_or(step.from->value_dtype));
      step.report.to = dense_name(step.dense_dtype);
      step.report.kept = decode_preserves(*step.from, step.dense_dtype);
      return step;
    }
    if (step.from->dialect == target_->id && follows_source(options_)) {
      step.action = Action::kKeep;
      step.to = step.from;
      step.report.to = step.report.from;
      step.report.kept = {.codes = true,
                          .statistics = true,
                          .values = true,
                          .values_dtype = DType::kF32,
                          .note = "unchanged"};
      return step;
    }
    step.action = Action::kTranscode;
    step.target = {target_, options_.quantize, options_.lossless_only};
    step.target.options.value_dtype = options_.value_dtype.value_or(step.from->value_dtype);
    try {
      step.to = transcoded_spec(*step.from, step.target);
      step.report.kept = plan_transcode(*step.from, step.target);
    } catch (const Error& e) {
      throw with_context("convert: layer \"" + name + "\": ", e);
    }
    step.report.to = describe_form(*step.to);
    return step;
  }

  bool skipped(const std::string& module) const {
    return std::any_of(skips_.begin(), skips_.end(),
                       [&](const NamePattern& skip) { return skip.matches(module); });
  }

  /// A dense weight of a linear layer is quantized; anything else is copied.
  Step plan_weight(const std::string& name) {
    Step step = copy(name);
    const TensorView view = reader_.describe_tensor(name);
    const std::string module = module_of_weight(name);
    const bool linear = view.shape.size() == 2 && is_weight_dtype(view.dtype) && !module.empty() &&
                        !is_embedding(module);
    if (!linear || skipped(module)) return step;
    step.target.dialect = target_;
    if (!choose_options(view, step)) return step;
    step.action = Action::kQuantize;
    step.module = module;
    step.from_dtype = view.dtype;
    step.report = {.name = module,
                   .from = dense_name(view.dtype),
                   .to = describe_form(*step.to),
                   .kept = {.note = "quantized from dense weights"},
                   .relative_error = 0};
    ++quantized_;
    return step;
  }

  /// What the caller left open is tried in the order of common use. False if the layer cannot have
  /// any such form; the first refusal is kept.
  bool choose_options(const TensorView& view, Step& step) {
    constexpr std::array<int, 2> kBits = {4, 8};
    constexpr std::array<std::int64_t, 6> kGroups = {64, 32, 128, 16, 256, 0};
    const QuantizeOptions& asked = options_.quantize;
    QuantizeOptions o = asked;
    o.value_dtype = options_.value_dtype.value_or(view.dtype);
    if (o.quant_type.empty()) o.quant_type = "nf4";
    for (const int bits : kBits) {
      o.bits = asked.bits == 0 ? bits : asked.bits;
      o.method = method_for(*target_, o.bits, asked.method);
      for (const std::int64_t group : kGroups) {
        o.group_size = asked.group_size == 0 ? group : asked.group_size;
        try {
          step.to = target_->make_spec(view.shape[0], view.shape[1], o);
          step.target.options = o;
          return true;
        } catch (const Error& e) {
          if (!refusal_) refusal_ = e;
        }
        if (asked.group_size != 0) break;
      }
      if (asked.bits != 0) break;
    }
    return false;
  }

  void refuse_loss(const Step& step) const {
    if (!options_.lossless_only || step.action == Action::kCopy) return;
    // What depends on the values is judged when they are read.
    if (step.report.kept.note.find("depends on the values") != std::string::npos) return;
    if (loses_nothing(step.report.kept, step.action == Action::kDecode)) return;
    fail(Errc::kUnsupported,
         "convert: layer would lose from " + step.report.from + " to " + step.report.to +
             ", expected a lossless conversion: " + step.report.kept.note,
         {.tensor = step.report.name});
  }

  const ModelReader& reader_;
  const Dialect* target_;
  const ConvertOptions& options_;
  std::optional<DType> model_dtype_;
  std::vector<NamePattern> skips_;
  std::optional<Error> refusal_;
  int quantized_ = 0;
};

}  // namespace

std::vector<Step> plan_steps(const ModelReader& reader, const Dialect* target,
                             const ConvertOptions& options) {
  return Planner(reader, target, options).run();
}

Error with_context(const std::string& words, const Error& error) {
  // The site comes again behind the new message.
  const std::string site = Error(error.code(), "", error.site()).what();
  std::string message = error.what();
  if (message.ends_with(site)) message.resize(message.size() - site.size());
  return Error(error.code(), words + message, error.site());
}

const Dialect* convert_target(const std::string& name) {
  if (name == "dense") return nullptr;
  std::string known;
  for (const Dialect* dialect : dialects()) {
    if (dialect->name == name) return dialect;
    known += std::string(dialect->name) + ", ";
  }
  fail(Errc::kConfig, "convert: target is \"" + name + "\", expected one of " + known + "dense");
}

Preservation decode_preserves(const PackedSpec& from, DType dtype) {
  Preservation kept;
  kept.values = dtype == DType::kF32 || dtype == from.value_dtype;
  kept.values_dtype = dtype == DType::kF32 ? DType::kF32 : dtype;
  const std::string to(dtype_name(dtype));
  kept.note = kept.values ? "decoded; values fit " + to + " exactly"
                          : "decoded and rounded from " +
                                std::string(dtype_name(from.value_dtype)) + " to " + to;
  return kept;
}

bool loses_nothing(const Preservation& kept, bool dense) {
  return dense ? kept.values : kept.lossless();
}

}  // namespace checkpoint

QuantizeOptions follow_source() {
  QuantizeOptions options;
  options.bits = 0;
  options.group_size = 0;
  options.quant_type.clear();
  return options;
}

}  // namespace quantal

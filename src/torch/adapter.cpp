#include "quantal/torch/adapter.h"

#include <torch/torch.h>

#include <algorithm>
#include <set>
#include <utility>

#include "quantal/checkpoint.h"
#include "quantal/torch/embedding.h"
#include "quantal/transcode.h"
#include "torch/custom.h"

namespace quantal {
namespace {

std::int64_t tensor_bytes(const torch::Tensor& t) {
  return t.defined() ? static_cast<std::int64_t>(t.nbytes()) : 0;
}
std::int64_t tensor_numel(const torch::Tensor& t) { return t.defined() ? t.numel() : 0; }

/// Most dialects dequantize to the dtype of the weight that was quantized, HQQ to the compute
/// dtype, which LayerRules has put into the options.
QuantizeOptions options_for(const LayerRules::Choice& choice, torch::ScalarType weight_type) {
  QuantizeOptions options = choice.options;
  if (dialect_of(options.method).keeps_weight_dtype) options.value_dtype = from_torch(weight_type);
  return options;
}

/// A layer's row of the report; `weight` and the bias count once.
CoverageEntry entry_of(const std::string& name, const LinearImpl& layer) {
  CoverageEntry entry;
  entry.name = name;
  entry.parameters = layer.in_features * layer.out_features + tensor_numel(layer.current_bias());
  const auto form = layer.quantized();
  entry.bytes_before =
      form ? form->nbytes() : tensor_bytes(layer.weight) + tensor_bytes(layer.bias);
  entry.bytes_after = entry.bytes_before;
  entry.method = "dense";
  return entry;
}

/// "torch::nn::EmbeddingImpl" -> "Embedding".
std::string class_name(const torch::nn::Module& module) {
  std::string name = module.name();
  name.erase(0, name.rfind(':') + 1);
  if (name.ends_with("Impl")) name.resize(name.size() - 4);
  return name;
}

/// Each reason once.
void add_note(CoverageReport& report, const std::string& note) {
  const bool known = std::ranges::find(report.notes, note) != report.notes.end();
  if (!note.empty() && !known) report.notes.push_back(note);
}

/// Rows for everything that is not a quantal::Linear, tied parameters once.
void report_others(torch::nn::Module& model, CoverageReport& report) {
  std::set<const void*> seen;
  for (const auto& item : model.named_modules()) {
    const auto& module = item.value();
    const bool ours = std::dynamic_pointer_cast<LinearImpl>(module) ||
                      std::dynamic_pointer_cast<QuantizedLayerImpl>(module) ||
                      std::dynamic_pointer_cast<LoraImpl>(module);
    if (ours) continue;
    CoverageEntry entry;
    if (const auto table = std::dynamic_pointer_cast<EmbeddingImpl>(module);
        table && table->packed) {
      entry.name = item.key();
      entry.method = describe_form(table->packed->spec());
      entry.reason = "already quantized";
      entry.parameters = table->num_embeddings * table->embedding_dim;
      entry.bytes_before = entry.bytes_after = table->packed->nbytes();
      report.entries.push_back(std::move(entry));
      continue;
    }
    for (const auto& parameter : module->parameters(/*recurse=*/false)) {
      if (!parameter.defined() || !seen.insert(parameter.unsafeGetTensorImpl()).second) continue;
      entry.parameters += parameter.numel();
      entry.bytes_before += tensor_bytes(parameter);
    }
    if (entry.parameters == 0) continue;
    const bool plain = std::dynamic_pointer_cast<torch::nn::LinearImpl>(module) != nullptr;
    entry.name = item.key();
    entry.method = "dense";
    entry.reason = plain ? "torch::nn::Linear cannot be exchanged from outside; use quantal::Linear"
                         : class_name(*module) + ", not a linear layer";
    entry.bytes_after = entry.bytes_before;
    report.entries.push_back(std::move(entry));
  }
}

}  // namespace

// ------------------------------------------------------------------ base class

QuantizationAdapter::QuantizationAdapter(Backend backend, QuantizationConfig config)
    : backend_(backend), config_(std::move(config)) {
  if (!config_.note.empty()) report_.notes = {config_.note};
}
QuantizationAdapter::~QuantizationAdapter() = default;

void QuantizationAdapter::set_decision(const Decision& decision) {
  if (is_custom_method(decision.adapter)) registered_name_ = decision.adapter;
  warnings_ = decision.warnings;
  report_.substitutions = decision.substitutions;
}

void QuantizationAdapter::prepare_model_for_training(torch::nn::Module& model) {
  quantal::prepare_model_for_training(model);
}

namespace {

/// Exchanges a dense weight for its packed form.
double pack_linear(LinearImpl& layer, const LayerRules::Choice& choice) {
  const torch::NoGradGuard no_grad;
  const QuantizeOptions options = options_for(choice, layer.weight.scalar_type());
  PackedTensors packed = quantize(layer.weight, options);
  const torch::Tensor dense = layer.weight.cpu().contiguous();
  const double error =
      sampled_error(packed.cpu().view(), from_torch(dense.scalar_type()), dense.const_data_ptr());
  QuantizedLinear form(std::move(packed), layer.bias, to_torch(choice.compute_dtype));
  form->int8_threshold = choice.int8_threshold;
  form->activations = choice.activations.activations;
  layer.set_quantized(std::move(form));
  return error;
}

/// Method column of a report for a layer that was just quantized.
std::string form_text(const LinearImpl& layer, const QuantizeOptions& options) {
  if (layer.custom) return class_name(*layer.custom);
  if (options.method != QuantizationMethod::NONE) return describe_options(options);
  return layer.packed ? describe_form(layer.packed->spec()) : "dense";
}

}  // namespace

double QuantizationAdapter::quantize_linear(LinearImpl& layer, const LayerRules::Choice& choice) {
  if (choice.options.method != QuantizationMethod::NONE) return pack_linear(layer, choice);
  const torch::NoGradGuard no_grad;
  const torch::Tensor weight = layer.weight.detach(), bias = layer.bias;
  const Linear made = layer_for(choice, layer.in_features, layer.out_features, bias.defined());
  const auto form = made->quantized();
  if (!form) {
    fail(Errc::kUnsupported,
         "quantize_linear: create_quantized_linear gave a dense layer, expected one that holds a "
         "quantized form");
  }
  form->quantize_weights(weight);
  form->set_bias(bias);
  if (made->packed) {
    layer.set_quantized(QuantizedLinear(made->packed));
  } else {
    layer.set_custom(form);
  }
  const auto exact = weight.cpu().to(torch::kDouble);
  const double norm = exact.norm().item<double>();
  const auto error = exact - form->dequantize_weights().cpu().to(torch::kDouble);
  return norm > 0 ? error.norm().item<double>() / norm : 0;
}

void replace_linear_with_quantized(torch::nn::Module& model, QuantizationAdapter& adapter,
                                   const std::optional<std::vector<std::string>>& skip_modules) {
  LayerRules rules = adapter.layer_rules(skip_modules);
  CoverageReport& report = adapter.report();
  report.entries.clear();
  for (const auto& [name, layer] : named_linears(model)) {
    CoverageEntry entry = entry_of(name, *layer);
    if (layer->is_quantized()) {
      entry.reason = "already quantized";
      report.entries.push_back(std::move(entry));
      continue;
    }
    const auto choice = rules.choose(name, layer->out_features, layer->in_features);
    entry.reason = choice.reason;
    if (choice.quantize) {
      entry.relative_error = adapter.quantize_linear(*layer, choice);
      add_note(report, choice.activations.reason);
      entry.method = form_text(*layer, choice.options);
      const auto form = layer->quantized();
      entry.bytes_after = form ? form->nbytes() : entry.bytes_before;
    }
    report.entries.push_back(std::move(entry));
  }
  report_others(model, report);
  report.unmatched_patterns = rules.unmatched();
}

// ------------------------------------------------------------------ concrete adapters

Linear DialectAdapter::create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                               bool bias) {
  const auto choice = LayerRules(config()).choose("", out_features, in_features);
  if (!choice.quantize) {
    fail(Errc::kConfig, "create_quantized_linear: layer [" + std::to_string(out_features) + ", " +
                            std::to_string(in_features) + "] is not quantized: " + choice.reason);
  }
  const torch::ScalarType compute = to_torch(choice.compute_dtype);
  const QuantizeOptions options = options_for(choice, compute);
  const PackedSpec spec = dialect_of(options.method).make_spec(out_features, in_features, options);
  torch::Tensor bias_values;
  if (bias) bias_values = torch::zeros({out_features}, torch::TensorOptions().dtype(compute));
  QuantizedLinear form(empty_packed(spec), bias_values, compute);
  form->int8_threshold = choice.int8_threshold;
  form->activations = choice.activations.activations;
  return Linear(std::move(form));
}

void DialectAdapter::quantize_model(torch::nn::Module& model) {
  replace_linear_with_quantized(model, *this);
}

double DialectAdapter::quantize_linear(LinearImpl& layer, const LayerRules::Choice& choice) {
  return pack_linear(layer, choice);
}

LayerRules DialectAdapter::layer_rules(
    const std::optional<std::vector<std::string>>& skip_modules) const {
  QuantizationConfig rules = config();
  if (skip_modules) rules.skip_modules = *skip_modules;
  return LayerRules(rules);
}

DialectAdapter::DialectAdapter(std::string_view name, Backend backend,
                               const QuantizationConfig& config)
    : QuantizationAdapter(backend, config) {
  const std::string refusal = adapter_refusal(name, backend, config);
  if (!refusal.empty()) fail(Errc::kUnsupported, refusal);
}

Linear FallbackAdapter::create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                                bool bias) {
  return Linear(in_features, out_features, bias);
}

void FallbackAdapter::quantize_model(torch::nn::Module& model) {
  report().entries.clear();
  for (const auto& [name, layer] : named_linears(model)) {
    CoverageEntry entry = entry_of(name, *layer);
    entry.reason = "no quantization applied (fallback)";
    report().entries.push_back(std::move(entry));
  }
  report_others(model, report());
}

void FallbackAdapter::prepare_model_for_training(torch::nn::Module& model) { model.train(); }

namespace {

template <class Adapter>
std::unique_ptr<QuantizationAdapter> make_adapter(Backend backend,
                                                  const QuantizationConfig& config) {
  return std::make_unique<Adapter>(backend, config);
}

}  // namespace

std::unique_ptr<QuantizationAdapter> create_quantization_adapter(Backend backend,
                                                                 const QuantizationConfig& config,
                                                                 std::optional<Support> support,
                                                                 std::optional<Fallback> fallback) {
  Decision decision = decide_adapter(backend, config, support, fallback);
  // A direct construction asks the config; what the caller said in an argument stands there too.
  if (support) {
    decision.config.backend_options["support"] =
        *support == Support::kExtended ? "extended" : "documented";
  }
  using Make = std::unique_ptr<QuantizationAdapter> (*)(Backend, const QuantizationConfig&);
  static const std::map<std::string_view, Make> kAdapters = {
      {"BitsAndBytesAdapter", make_adapter<BitsAndBytesAdapter>},
      {"HQQAdapter", make_adapter<HQQAdapter>},
      {"MLXAdapter", make_adapter<MLXAdapter>},
      {"QuantoAdapter", make_adapter<QuantoAdapter>},
      {"FallbackAdapter", make_adapter<FallbackAdapter>},
  };
  const auto own = kAdapters.find(decision.adapter);
  std::unique_ptr<QuantizationAdapter> adapter =
      own != kAdapters.end() ? own->second(backend, decision.config)
                             : make_registered(decision.adapter, backend, decision.config);
  adapter->set_decision(decision);
  return adapter;
}

}  // namespace quantal

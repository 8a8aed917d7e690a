#include <string>
#include <utility>
#include <vector>

#include "policy/methods.h"

namespace quantal {
namespace {

LayerRules::Choice dense(LayerRules::Choice choice, std::string reason) {
  choice.quantize = false;
  choice.reason = std::move(reason);
  return choice;
}

}  // namespace

QuantizationConfig policy::apply_override(const QuantizationConfig& config,
                                          const LayerOverride& layer) {
  QuantizationConfig out = config;
  if (layer.method) out.method = *layer.method;
  if (layer.bits) out.bits = *layer.bits;
  if (layer.group_size) {
    out.group_size = *layer.group_size;
    out.block_size.reset();
  }
  if (layer.compute_dtype) out.compute_dtype = layer.compute_dtype;
  if (layer.double_quant) out.double_quant = *layer.double_quant;
  if (layer.quant_type) out.quant_type = *layer.quant_type;
  return out;
}

LayerRules::LayerRules(const QuantizationConfig& resolved) : config_(resolved) {
  for (const std::string& pattern : resolved.skip_modules) {
    skips_.push_back({NamePattern(pattern, NamePattern::Plain::kAnywhere), {}});
  }
  for (const auto& [pattern, settings] : resolved.layer_configs) {
    overrides_.push_back({NamePattern(pattern, NamePattern::Plain::kPrefix), settings});
  }
}

const LayerRules::Rule* LayerRules::best_override(const std::string& name) {
  const Rule* best = nullptr;
  for (Rule& rule : overrides_) {
    if (!rule.pattern.matches(name)) continue;
    ++rule.hits;
    if (best == nullptr || rule.pattern.specificity() >= best->pattern.specificity()) best = &rule;
  }
  return best;
}

LayerRules::Choice LayerRules::choose(const std::string& name, std::int64_t out_features,
                                      std::int64_t in_features) {
  const Rule* skip = nullptr;
  for (Rule& rule : skips_) {
    if (!rule.pattern.matches(name)) continue;
    ++rule.hits;
    if (skip == nullptr) skip = &rule;
  }
  const Rule* override_rule = best_override(name);
  const LayerOverride no_override;
  const LayerOverride& settings = override_rule ? override_rule->settings : no_override;
  const QuantizationConfig layer = policy::apply_override(config_, settings);

  Choice choice;
  choice.options = policy::base_options(layer);
  choice.compute_dtype = layer.compute_dtype.value_or(DType::kF32);
  if (layer.method == QuantizationMethod::BNB_INT8) choice.int8_threshold = int8_threshold(config_);
  if (skip != nullptr) {
    return dense(std::move(choice), "skip_modules pattern '" + skip->pattern.text() + "'");
  }
  if (settings.skip) {
    return dense(std::move(choice),
                 settings.skip_reason.empty()
                     ? "layer_configs pattern '" + override_rule->pattern.text() + "' skips it"
                     : settings.skip_reason);
  }
  // A method of one's own takes every layer; its adapter knows what it cannot do.
  if (!config_.custom_method.empty() && !settings.method) return choice;
  if (layer.method == QuantizationMethod::NONE) return dense(std::move(choice), "method is none");

  const bool strict = policy::fallback_option(config_) == Fallback::kError;
  const std::string where = "layer '" + name + "': ";
  const std::string unbuilt = policy::build_refusal(layer.method, choice.options.bits);
  if (!unbuilt.empty()) {
    if (strict) fail(Errc::kUnsupported, where + unbuilt);
    choice.refused = true;
    return dense(std::move(choice), unbuilt);
  }
  try {
    const PackedSpec spec =
        dialect_of(layer.method).make_spec(out_features, in_features, choice.options);
    choice.activations = choose_activations(config_, spec);
  } catch (const Error& error) {
    if (strict) fail(error.code(), where + error.what(), error.site());
    choice.refused = true;
    return dense(std::move(choice), error.what());
  }
  return choice;
}

std::vector<std::string> LayerRules::unmatched() const {
  std::vector<std::string> out;
  // The default list is not the user's: a model without an lm_head is no typing error.
  const bool default_skips = config_.skip_modules == QuantizationConfig{}.skip_modules;
  for (const Rule& rule : skips_) {
    if (rule.hits == 0 && !default_skips) out.push_back("skip_modules: " + rule.pattern.text());
  }
  for (const Rule& rule : overrides_) {
    if (rule.hits == 0) out.push_back("layer_configs: " + rule.pattern.text());
  }
  return out;
}

}  // namespace quantal

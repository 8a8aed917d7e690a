#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "policy/methods.h"
#include "policy/text.h"

namespace quantal {
namespace {

using policy::effective_bits;

using M = QuantizationMethod;

/// Group sizes that a remedy may name, the best first.
constexpr std::array<std::int64_t, 6> kUsualGroups = {64, 32, 128, 16, 8, 0};
constexpr std::size_t kNamedLayers = 3;

/// bitsandbytes NF4 and FP4 alone quantize their scales again.
bool has_double_quant(M method) { return method == M::BNB_NF4; }

/// True if the dialect takes every layer with this group size.
bool takes_all(const std::vector<LayerShape>& layers, QuantizeOptions options,
               std::int64_t group_size) {
  options.group_size = group_size;
  try {
    for (const LayerShape& layer : layers) {
      dialect_of(options.method).make_spec(layer.out_features, layer.in_features, options);
    }
  } catch (const Error&) {
    return false;
  }
  return true;
}

std::string label(const LayerShape& layer) {
  const std::array<std::int64_t, 2> shape = {layer.out_features, layer.in_features};
  return (layer.name.empty() ? "" : "'" + layer.name + "' ") + shape_string(shape);
}

/// Runs the rules in order; each rule appends at most a few findings.
class Validation {
 public:
  Validation(const QuantizationConfig& config, Backend backend, const ValidationFacts& facts)
      : config_(config),
        backend_(backend),
        facts_(facts),
        bits_(effective_bits(config.method, config.bits)) {}

  std::vector<Issue> run() {
    read_options();
    check_pair();
    check_bits();
    check_mps();
    check_dtypes();
    check_storage();
    check_settings();
    check_no_effect();
    check_activations();
    check_layers();
    if (facts_.layers) check_model(*facts_.layers);
    return std::move(issues_);
  }

 private:
  bool custom() const { return !config_.custom_method.empty(); }
  void error(std::string id, std::string message, std::string remedy) {
    issues_.push_back({std::move(id), "error", std::move(message), std::move(remedy)});
  }
  void warning(std::string id, std::string message, std::string remedy) {
    issues_.push_back({std::move(id), "warning", std::move(message), std::move(remedy)});
  }

  void read_options() {
    try {
      extended_ =
          policy::support_option(config_).value_or(Support::kDocumented) == Support::kExtended;
      policy::fallback_option(config_);
      policy::base_options(config_);
    } catch (const Error& failure) {
      error("options.value", failure.what(), "use one of the listed values");
      options_legal_ = false;
    }
    if (custom()) return;  // its adapter may read options of its own
    const auto known = policy::known_options();
    for (const auto& [key, value] : config_.backend_options) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      warning("options.unknown", "backend_options: '" + key + "' is not known and has no effect",
              "did you mean '" + std::string(policy::nearest_name(key, known)) +
                  "'? Known: " + policy::join(known));
    }
  }

  void check_pair() {
    check_matrix(config_.method, "");
    if (!method_built(config_.method)) {
      warning("method.not_built", policy::build_refusal(config_.method, bits_),
              "use a method that is built, or backend_options={'fallback': 'nearest'}");
    }
  }

  void check_matrix(QuantizationMethod method, const std::string& where) {
    if (extended_) return;
    const std::string refusal = policy::matrix_refusal(backend_, method);
    if (refusal.empty()) return;
    error("backend." + std::string(policy::family_of(method).dialect), refusal + where,
          "pass backend_options={'support': 'extended'} to use quantal's own kernels, or "
          "backend_options={'fallback': 'nearest'} for the closest supported method");
  }

  void check_bits() {
    const std::string conflict = policy::bits_conflict(config_);
    if (!conflict.empty()) {
      error("method.bits", conflict,
            "leave bits unset, or choose a method with " + std::to_string(config_.bits) + " bits");
    }
    if (!method_built(config_.method)) return;
    const std::string refusal = policy::build_refusal(config_.method, bits_);
    if (!refusal.empty()) error("method.width", refusal, "use one of these widths");
  }

  /// True where a method's own name promises 4 bits on MPS: no warning for what is documented.
  bool names_four_bits_on_mps() const {
    return method_bits(config_.method) == 4 && documented_support(Backend::MPS, config_.method);
  }

  void check_mps() {
    if (backend_ != Backend::MPS || extended_) return;
    if (bits_ == 4 && config_.method != M::NONE && !names_four_bits_on_mps()) {
      warning("mps.bits", "MPS backend has limited 4-bit quantization support",
              "use mlx_int4 or quanto_int4, or 8 bits");
    }
  }

  void check_dtypes() {
    if (!config_.compute_dtype) return;
    if (backend_ == Backend::MPS && *config_.compute_dtype == DType::kBF16) {
      warning("mps.bfloat16", "MPS backend doesn't support bfloat16",
              "use compute_dtype float16, or leave it unset");
    }
    if (backend_ == Backend::CUDA && *config_.compute_dtype == DType::kBF16 &&
        !facts_.cuda_has_bf16) {
      warning("cuda.bfloat16", "this CUDA device doesn't support bfloat16",
              "use compute_dtype float16, or leave it unset");
    }
    if (!is_weight_dtype(*config_.compute_dtype)) {
      error("compute_dtype.kind",
            "compute_dtype is " + std::string(dtype_torch_name(*config_.compute_dtype)) +
                ", expected float32, float16 or bfloat16",
            "use one of these");
    }
  }

  void check_settings() {
    if (!options_legal_) return;
    const std::string refusal = policy::setting_refusal(policy::base_options(config_));
    if (!refusal.empty()) {
      const auto names = [&](const char* setting) { return refusal.find(setting) != refusal.npos; };
      const char* id = names("group_size")   ? "group_size.illegal"
                       : names("quant_type") ? "quant_type.unknown"
                                             : "settings.illegal";
      error(id, refusal, "use one of these");
    }
  }

  /// FSDP flattens the parameters of a unit under one dtype and may cast floats on the way: packed
  /// bytes survive as uint8, or as the dtype that everything else of the unit has.
  void check_storage() {
    if (!config_.storage_dtype) return;
    const DType storage = *config_.storage_dtype;
    const std::string refusal = policy::storage_refusal(storage);
    if (!refusal.empty()) {
      error("storage_dtype.kind", refusal, "leave it unset, or use uint8");
      return;
    }
    const DType compute =
        config_.compute_dtype.value_or(default_compute_dtype(backend_, facts_.cuda_has_bf16));
    if (storage == DType::kU8 || storage == compute) return;
    warning("storage_dtype.fsdp",
            "storage_dtype " + std::string(dtype_torch_name(storage)) +
                " differs from compute_dtype " + std::string(dtype_torch_name(compute)) +
                ": FSDP needs one dtype per unit, and a cast would destroy packed bytes",
            "use storage_dtype " + std::string(dtype_torch_name(compute)) +
                ", or leave it unset (uint8, which fully_shard keeps as it is)");
  }

  /// Settings that were asked for and that nothing reads with this method.
  void check_no_effect() {
    if (config_.method == M::NONE) return;
    const auto no_effect = [this](const char* id, const std::string& setting, const char* owner) {
      warning(id, setting + " has no effect on " + std::string(method_name(config_.method)),
              std::string("it is a setting of ") + owner + "; leave it unset");
    };
    if (config_.double_quant_set && config_.double_quant && !has_double_quant(config_.method)) {
      no_effect("double_quant.no_effect", "double_quant", "bnb_nf4");
    }
    if (config_.quant_type != QuantizationConfig{}.quant_type && config_.method != M::BNB_NF4) {
      no_effect("quant_type.no_effect", "quant_type '" + config_.quant_type + "'", "bnb_nf4");
    }
    if (config_.block_size && !policy::is_bnb(config_.method)) {
      no_effect("block_size.no_effect", "block_size", "bitsandbytes; others have group_size");
    }
    if (config_.method == M::HQQ) return;
    if (config_.quant_scale || config_.quant_zero.value_or(false)) {
      no_effect("hqq.quant_meta", "quant_zero or quant_scale", "hqq");
    }
  }

  /// int8 activations that the form of the method cannot have, whatever the layer.
  void check_activations() {
    if (!options_legal_ || policy::activations_option(config_) == Activations::kExact) return;
    try {
      const auto spec = policy::probe_spec(policy::base_options(config_));
      if (!spec) return;
      const std::string refusal = int8_activations_refusal(*spec);
      if (refusal.empty()) return;
      warning("activations.no_effect",
              "activations 'int8' has no effect on " + std::string(method_name(config_.method)) +
                  ": " + refusal,
              "leave it unset: products are exact");
    } catch (const Error&) {
      // An illegal setting is an issue of its own.
    }
  }

  void check_layers() {
    check_patterns();
    for (const auto& [pattern, layer] : config_.layer_configs) {
      const std::string where = " (layer_configs '" + pattern + "')";
      const M method = layer.method.value_or(config_.method);
      if (layer.skip || method == M::NONE) continue;
      if (layer.method && *layer.method != config_.method) check_matrix(method, where);
      if (!method_built(method)) continue;
      const int bits = layer.bits.value_or(effective_bits(method, config_.bits));
      const std::string refusal = bits == 16 ? "" : policy::width_refusal(method, bits);
      if (!refusal.empty()) {
        warning("layer.width", refusal + where, "these layers stay dense; use a listed width");
      }
      check_layer_settings(layer, method, where);
    }
  }

  void check_layer_settings(const LayerOverride& layer, M method, const std::string& where) {
    const QuantizationConfig merged = policy::apply_override(config_, layer);
    if (options_legal_ && (layer.group_size || layer.quant_type)) {
      const std::string refusal = policy::setting_refusal(policy::base_options(merged));
      if (!refusal.empty()) error("layer.settings", refusal + where, "use one of these");
    }
    if (has_double_quant(method)) return;
    for (const auto& [given, name] : {std::pair{layer.double_quant.value_or(false), "double_quant"},
                                      std::pair{layer.quant_type.has_value(), "quant_type"}}) {
      if (!given) continue;
      warning("layer.no_effect",
              std::string(name) + " has no effect on " + std::string(method_name(method)) + where,
              "it is a setting of bnb_nf4; leave it out");
    }
  }

  // ---------------------------------------------------------------- with a model

  void check_model(const std::vector<LayerShape>& layers) {
    if (layers.empty()) {
      warning("model.no_linear", "the model has no linear layer: nothing would be quantized",
              "pass the model that holds the nn.Linear layers");
      return;
    }
    try {
      const Decision decision = decide_adapter(backend_, config_, {}, Fallback::kNone);
      try_layers(layers, decision.config);
    } catch (const Error&) {
      // What makes a decision impossible is an issue of its own above.
    }
  }

  void try_layers(const std::vector<LayerShape>& layers, const QuantizationConfig& resolved) {
    LayerRules rules(resolved);
    std::size_t quantized = 0, refused = 0, exact = 0;
    std::string reason, named, exact_reason;
    std::vector<LayerShape> wanted;  // layers of the config's own method
    for (const LayerShape& layer : layers) {
      const auto choice = rules.choose(layer.name, layer.out_features, layer.in_features);
      if (choice.options.method == resolved.method && (choice.quantize || choice.refused)) {
        wanted.push_back(layer);
      }
      quantized += choice.quantize ? 1u : 0u;
      if (!choice.activations.reason.empty() && exact++ == 0) {
        exact_reason = label(layer) + " (" + choice.activations.reason + ")";
      }
      if (!choice.refused) continue;
      if (refused == 0) reason = choice.reason;
      if (refused < kNamedLayers) named += (named.empty() ? "" : ", ") + label(layer);
      ++refused;
    }
    if (refused != 0) {
      warning("group_size.shape",
              std::to_string(refused) + " of " + std::to_string(layers.size()) +
                  " linear layers cannot be grouped and stay dense: " + named +
                  (refused > kNamedLayers ? " ..." : "") + " (" + reason + ")",
              group_remedy(wanted, resolved));
    } else if (quantized == 0 && (resolved.method != M::NONE || custom())) {
      warning("model.nothing", "every linear layer of the model is skipped, nothing is quantized",
              "shorten skip_modules or the skips of layer_configs");
    }
    if (exact != 0) {
      warning("activations.exact",
              std::to_string(exact) + " of " + std::to_string(layers.size()) +
                  " linear layers have no product with int8 activations: " + exact_reason,
              "another group_size, or leave them as they are");
    }
    const bool has_names = std::any_of(layers.begin(), layers.end(),
                                       [](const LayerShape& l) { return !l.name.empty(); });
    if (!has_names) return;
    for (const std::string& pattern : rules.unmatched()) {
      warning("pattern.unmatched", pattern + " matches no linear layer of the model",
              "correct the pattern; plain ones match whole dotted components");
    }
  }

  static std::string group_remedy(const std::vector<LayerShape>& layers,
                                  const QuantizationConfig& resolved) {
    if (resolved.method != M::NONE) {
      for (const std::int64_t size : kUsualGroups) {
        if (!takes_all(layers, policy::base_options(resolved), size)) continue;
        return "use group_size " + std::to_string(size) + ", which every layer has" +
               (size == 0 ? " (one group per row)" : "");
      }
    }
    return "choose a smaller group_size, or give these layers their own in layer_configs";
  }

  void check_patterns() {
    const auto check = [this](const std::string& pattern) {
      try {
        NamePattern(pattern, NamePattern::Plain::kAnywhere);
      } catch (const Error& failure) {
        error("layer.pattern", failure.what(), "correct the pattern");
      }
    };
    for (const std::string& pattern : config_.skip_modules) check(pattern);
    for (const auto& [pattern, layer] : config_.layer_configs) check(pattern);
  }

  const QuantizationConfig& config_;
  Backend backend_;
  const ValidationFacts& facts_;
  int bits_;
  bool extended_ = false;
  bool options_legal_ = true;
  std::vector<Issue> issues_;
};

}  // namespace

std::vector<Issue> validate_quantization_config(const QuantizationConfig& config, Backend backend,
                                                const ValidationFacts& facts) {
  return Validation(config, backend, facts).run();
}

}  // namespace quantal

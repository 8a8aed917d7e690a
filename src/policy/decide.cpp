#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>

#include "policy/methods.h"
#include "quantal/backend.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

std::string pair_name(M method, int bits) {
  std::string text(method_name(method));
  return method_bits(method) ? text : text + " " + std::to_string(bits) + "-bit";
}

/// One run of the factory: resolves a config step by step and records every change.
class Factory {
 public:
  Factory(Backend backend, const QuantizationConfig& config, std::optional<Support> support,
          std::optional<Fallback> fallback)
      : backend_(backend) {
    check_config(config);
    decision_.config = config;
    support_ = support ? *support : policy::support_option(config).value_or(Support::kDocumented);
    fallback_ = fallback ? *fallback : policy::fallback_option(config).value_or(Fallback::kNone);
    auto& options = decision_.config.backend_options;
    if (support) options["support"] = policy::support_name(*support);
    if (fallback) options["fallback"] = policy::fallback_name(*fallback);
  }

  Decision run() {
    resolve_bits();
    if (custom()) {
      decision_.adapter = config().custom_method;
    } else {
      resolve_method();
    }
    resolve_dtype();
    resolve_storage();
    resolve_settings();
    if (!refused_) resolve_layers();
    return std::move(decision_);
  }

 private:
  QuantizationConfig& config() { return decision_.config; }
  bool custom() const { return !decision_.config.custom_method.empty(); }

  void substitute(std::string what, std::string asked, std::string used, std::string reason) {
    decision_.substitutions.push_back(
        {std::move(what), std::move(asked), std::move(used), std::move(reason)});
  }

  void resolve_bits() {
    const std::string conflict = policy::bits_conflict(config());
    const int used = policy::effective_bits(config().method, config().bits);
    if (!conflict.empty()) {
      if (fallback_ == Fallback::kError) fail(Errc::kConfig, "quantization config: " + conflict);
      decision_.warnings.push_back(conflict + "; using " + std::to_string(used) +
                                   " bits (leave bits unset, or choose another method)");
      substitute("bits", std::to_string(config().bits), std::to_string(used), conflict);
    }
    config().bits = used;
    config().bits_set = true;
  }

  /// Every reason against a pair; empty if it can run.
  std::string refusal(M method, int bits) const {
    std::string text;
    if (support_ == Support::kDocumented) text = policy::matrix_refusal(backend_, method);
    const std::string build = policy::build_refusal(method, bits);
    if (!text.empty() && !build.empty()) text += "; ";
    return text + build;
  }

  /// The allowed pair closest in bits, then of the same dialect, then first of the registry; NONE
  /// if no pair is allowed.
  std::pair<M, int> nearest(M method, int bits) const {
    std::pair<M, int> best = {M::NONE, bits};
    std::tuple<int, int> best_cost = {1 << 30, 0};
    const auto dialect_of_method = [](M m) { return policy::family_of(m).dialect; };
    for (const MethodInfo& candidate : methods()) {
      for (const int width : policy::built_bits(candidate.method)) {
        if (method_bits(candidate.method).value_or(width) != width) continue;
        if (!refusal(candidate.method, width).empty()) continue;
        const std::tuple<int, int> cost = {std::abs(width - bits),
                                           candidate.dialect == dialect_of_method(method) ? 0 : 1};
        if (cost < best_cost) {
          best = {candidate.method, width};
          best_cost = cost;
        }
      }
    }
    return best;
  }

  std::string remedies(M method, int bits) const {
    std::string text;
    if (policy::build_refusal(method, bits).empty()) {
      text = "pass backend_options={'support': 'extended'} to run it on quantal's own kernels, or ";
    } else {
      text = "choose a method that is built, or pass ";
      return text + "backend_options={'fallback': 'nearest'} for the closest supported method";
    }
    return text + "backend_options={'fallback': 'nearest'} for the closest supported method";
  }

  void resolve_method() {
    const M asked = config().method;
    decision_.adapter = policy::family_of(asked).adapter;
    if (asked == M::NONE) return;
    const std::string reason = refusal(asked, config().bits);
    if (reason.empty()) return;
    if (fallback_ == Fallback::kError) {
      fail(Errc::kUnsupported,
           "create_quantization_adapter: " + reason + "; " + remedies(asked, config().bits));
    }
    const auto [method, bits] = fallback_ == Fallback::kNearest
                                    ? nearest(asked, config().bits)
                                    : std::pair<M, int>{M::NONE, config().bits};
    use_instead(method, bits, reason);
  }

  void use_instead(M method, int bits, const std::string& reason) {
    const M asked = config().method;
    const int asked_bits = config().bits;
    substitute("method", pair_name(asked, asked_bits), pair_name(method, bits), reason);
    decision_.adapter = policy::family_of(method).adapter;
    config().method = method;
    config().bits = bits;
    if (method == M::NONE) {
      refused_ = true;
      decision_.substitutions.back().used = "none";
      decision_.warnings.push_back(
          "No quantization support for " + std::string(backend_name(backend_)) +
          ", using fallback (no quantization): " + reason + "; " + remedies(asked, asked_bits));
      return;
    }
    decision_.warnings.push_back("using " + pair_name(method, bits) + " instead of " +
                                 pair_name(asked, asked_bits) + ": " + reason +
                                 " (backend_options fallback is 'nearest')");
    if (!policy::setting_refusal(policy::base_options(config())).empty()) use_default_sizes();
  }

  /// A substitute starts from its own sizes where the asked ones mean nothing to it.
  void use_default_sizes() {
    const QuantizationConfig defaults;
    substitute("group_size", std::to_string(config().group_size),
               std::to_string(defaults.group_size), "not legal for the substituted method");
    config().group_size = defaults.group_size;
    config().block_size.reset();
    config().quant_type = defaults.quant_type;
  }

  void resolve_dtype() {
    if (!config().compute_dtype) {
      const Machine& machine = probe_machine();
      // A plan for another machine counts on a device of today.
      const bool has_bf16 = machine.cuda_devices == 0 || machine.cuda_bf16;
      config().compute_dtype = default_compute_dtype(backend_, has_bf16);
      return;
    }
    if (!is_weight_dtype(*config().compute_dtype)) {
      fail(Errc::kConfig, "quantization config: compute_dtype is " +
                              std::string(dtype_torch_name(*config().compute_dtype)) +
                              ", expected float32, float16 or bfloat16");
    }
    if (backend_ == Backend::MPS && *config().compute_dtype == DType::kBF16 &&
        support_ == Support::kDocumented) {
      decision_.warnings.emplace_back(
          "MPS backend doesn't support bfloat16; use compute_dtype float16, or leave it unset");
    }
  }

  /// Packed bytes are bytes; what is not quantized is stored as it is computed.
  void resolve_storage() {
    if (!config().storage_dtype) {
      const bool packed = config().method != M::NONE || custom();
      config().storage_dtype = packed ? DType::kU8 : config().compute_dtype;
      return;
    }
    const std::string refusal = policy::storage_refusal(*config().storage_dtype);
    if (!refusal.empty()) fail(Errc::kConfig, "quantization config: " + refusal);
  }

  void resolve_settings() {
    const std::string text = policy::setting_refusal(policy::base_options(config()));
    if (!text.empty()) fail(Errc::kConfig, "quantization config: " + text);
  }

  void resolve_layers() {
    for (auto& [pattern, layer] : config().layer_configs) {
      if (!layer.skip) resolve_layer(pattern, layer);
    }
  }

  void resolve_layer(const std::string& pattern, LayerOverride& layer) {
    if (custom() && !layer.method) {
      layer.skip = layer.bits == 16;
      return;
    }
    M method = layer.method.value_or(config().method);
    const int bits = layer.bits.value_or(policy::effective_bits(method, config().bits));
    if (method == M::NONE || bits == 16) {
      layer.skip = true;
      return;
    }
    method = policy::sibling_with_bits(method, bits);
    std::string reason;
    if (support_ == Support::kDocumented) reason = policy::matrix_refusal(backend_, method);
    const std::string width = policy::width_refusal(method, bits);
    if (!reason.empty() && !width.empty()) reason += "; ";
    reason += width;
    layer.method = method;
    layer.bits = bits;
    if (!reason.empty()) substitute_layer(pattern, layer, reason);
    if (!layer.skip && decision_.adapter == "FallbackAdapter") {
      decision_.adapter = policy::family_of(*layer.method).adapter;
    }
  }

  void substitute_layer(const std::string& pattern, LayerOverride& layer,
                        const std::string& reason) {
    const std::string where = "layer_configs['" + pattern + "']";
    const std::string asked =
        std::string(method_name(*layer.method)) + " " + std::to_string(*layer.bits) + "-bit";
    if (fallback_ == Fallback::kError) fail(Errc::kUnsupported, where + ": " + reason);
    std::string used = "dense";
    std::pair<M, int> choice = {M::NONE, 0};
    if (fallback_ == Fallback::kNearest) choice = nearest(*layer.method, *layer.bits);
    if (choice.first == M::NONE) {
      layer.skip = true;
      layer.skip_reason = where + ": " + reason;
    } else {
      layer.method = choice.first;
      layer.bits = choice.second;
      used = pair_name(choice.first, choice.second);
    }
    decision_.warnings.push_back(where + ": " + reason + "; using " + used);
    substitute(where, asked, used, reason);
  }

  Backend backend_;
  Support support_;
  Fallback fallback_;
  bool refused_ = false;
  Decision decision_;
};

}  // namespace

Decision decide_adapter(Backend backend, const QuantizationConfig& config,
                        std::optional<Support> support, std::optional<Fallback> fallback) {
  return Factory(backend, config, support, fallback).run();
}

namespace {

/// Why a config means nothing to the adapter of a family: another family's method, or a width that
/// none of its methods has.
std::string settings_refusal(const policy::FamilyFacts& family, const QuantizationConfig& config) {
  if (config.method == M::NONE) return {};
  std::string legal;
  bool has_width = false;
  for (const MethodInfo& method : methods()) {
    if (method.dialect != family.dialect) continue;
    legal += (legal.empty() ? "" : ", ") + std::string(method.name);
    has_width = has_width || policy::has_width(policy::built_bits(method.method), config.bits);
  }
  if (policy::family_of(config.method).dialect != family.dialect) {
    return std::string(family.adapter) + ": method is " + std::string(method_name(config.method)) +
           ", expected " + legal;
  }
  if (policy::bits_given(config) && !has_width) {
    return std::string(family.title) + " doesn't support " + std::to_string(config.bits) +
           "-bit quantization";
  }
  const std::string conflict = policy::bits_conflict(config);
  if (!conflict.empty()) {
    return std::string(family.adapter) + ": " + conflict +
           ", expected bits unset or a method that has them";
  }
  return {};
}

}  // namespace

std::string adapter_refusal(std::string_view adapter, Backend backend,
                            const QuantizationConfig& config) {
  if (adapter == "FallbackAdapter") return {};
  const policy::FamilyFacts* family = policy::find_adapter(adapter);
  if (family == nullptr) {
    fail(Errc::kConfig, "adapter is '" + std::string(adapter) +
                            "', expected BitsAndBytesAdapter, HQQAdapter, MLXAdapter, "
                            "QuantoAdapter or FallbackAdapter");
  }
  bool documented = false, built = false;
  for (const MethodInfo& method : methods()) {
    if (method.dialect != family->dialect) continue;
    documented = documented || documented_support(backend, method.method);
    built = built || method_built(method.method);
  }
  const bool extended = policy::support_option(config) == Support::kExtended;
  if (!documented && !extended && !family->direct_on.empty()) {
    return std::string(family->title) + " quantization is only supported on " +
           std::string(family->direct_on);
  }
  if (!built) return std::string(family->title) + " is not built in this version of quantal";
  return settings_refusal(*family, config);
}

}  // namespace quantal

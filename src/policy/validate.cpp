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

/// Runs the rules in order; each rule appends at most a few findings.
class Validation {
 public:
  Validation(const QuantizationConfig& config, Backend backend)
      : config_(config), backend_(backend), bits_(effective_bits(config.method, config.bits)) {}

  std::vector<Issue> run() {
    read_options();
    check_pair();
    check_bits();
    check_mps();
    check_dtypes();
    check_settings();
    check_layers();
    return std::move(issues_);
  }

 private:
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
    if (bits_ == 4 && config_.method != QuantizationMethod::NONE && !names_four_bits_on_mps()) {
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
    if (config_.method == QuantizationMethod::HQQ) return;
    if (config_.quant_scale || config_.quant_zero.value_or(false)) {
      warning("hqq.quant_meta",
              "quant_zero and quant_scale have no effect on " +
                  std::string(method_name(config_.method)),
              "they are settings of hqq; leave them unset");
    }
  }

  void check_layers() {
    check_patterns();
    for (const auto& [pattern, layer] : config_.layer_configs) {
      const std::string where = " (layer_configs '" + pattern + "')";
      const QuantizationMethod method = layer.method.value_or(config_.method);
      if (layer.skip || method == QuantizationMethod::NONE) continue;
      if (layer.method && *layer.method != config_.method) check_matrix(method, where);
      if (!method_built(method)) continue;
      const int bits = layer.bits.value_or(effective_bits(method, config_.bits));
      const std::string refusal = policy::build_refusal(method, bits);
      if (!refusal.empty() && bits != 16) {
        warning("layer.width", refusal + where, "these layers stay dense; use a listed width");
      }
    }
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
  int bits_;
  bool extended_ = false;
  bool options_legal_ = true;
  std::vector<Issue> issues_;
};

}  // namespace

std::vector<Issue> validate_quantization_config(const QuantizationConfig& config, Backend backend) {
  return Validation(config, backend).run();
}

}  // namespace quantal

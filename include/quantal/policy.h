// quantal policy: configuration, validation, recommendation and the choice of an adapter. The only
// room that may substitute one method for another, and it returns every substitution with a reason.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"

namespace quantal {

/// "documented" follows the compatibility matrix of the documentation; "extended" allows every pair
/// that quantal's own kernels run.
enum class Support { kDocumented, kExtended };
/// What the factory does with an unsupported pair.
enum class Fallback { kNone, kNearest, kError };

/// Settings of one layer pattern; unset members inherit from the config.
struct LayerOverride {
  std::optional<QuantizationMethod> method;
  std::optional<int> bits;
  std::optional<std::int64_t> group_size;
  std::optional<DType> compute_dtype;
  std::optional<bool> double_quant;
  std::optional<std::string> quant_type;
  bool skip = false;  ///< leave this layer dense
};

/// The configuration of the public API (docs/api.md); same names, order and defaults as in Python.
struct QuantizationConfig {
  QuantizationMethod method = QuantizationMethod::BNB_NF4;
  int bits = 4;
  bool bits_set = false;  ///< false while `bits` is only the default
  std::int64_t group_size = 64;
  std::optional<DType> compute_dtype;
  std::optional<DType> storage_dtype;
  bool double_quant = true;
  std::string quant_type = "nf4";
  std::vector<std::string> skip_modules = {"lm_head"};
  std::vector<std::pair<std::string, LayerOverride>> layer_configs;  ///< in order given
  std::map<std::string, std::string> backend_options;
  std::optional<std::int64_t> block_size;  ///< bnb: used instead of group_size if set
  std::optional<bool> quant_zero;
  bool quant_scale = false;
};

/// From a JSON object with the members of the Python dataclass. Unknown keys throw Error{kConfig}
/// naming the nearest known one; "bits": null means unset.
QuantizationConfig config_from_json(const std::string& json);
std::string config_to_json(const QuantizationConfig& config);

/// One finding of validation.
struct Issue {
  std::string id;        ///< stable, e.g. "backend.bnb"
  std::string severity;  ///< "error" or "warning"
  std::string message;
  std::string remedy;
};
/// All findings; empty = valid. Never throws for a constructed config.
std::vector<Issue> validate_quantization_config(const QuantizationConfig& config, Backend backend);

/// True if the documented matrix has the pair. NONE is supported everywhere.
bool documented_support(Backend backend, QuantizationMethod method);
/// The documented matrix as a Markdown table, generated from the registry.
std::string compatibility_matrix_markdown();

/// A change that policy made to what was asked, e.g. {"bits", "4", "8", "method bnb_int8 has 8 bits"}.
struct Substitution {
  std::string what, asked, used, reason;
};

/// What the factory decided.
struct Decision {
  std::string adapter;  ///< "BitsAndBytesAdapter", "HQQAdapter", "MLXAdapter", "QuantoAdapter",
                        ///< "FallbackAdapter"
  QuantizationConfig config;  ///< resolved: bits of the method, compute_dtype of the backend
  std::vector<Substitution> substitutions;
  std::vector<std::string> warnings;  ///< to be shown to the user once
};
/// Chooses the adapter for a pair. Throws Error{kConfig} / Error{kUnsupported} with Fallback::kError.
/// backend_options "support" and "fallback" are read where the arguments are not given.
Decision decide_adapter(Backend backend, const QuantizationConfig& config,
                        std::optional<Support> support = {}, std::optional<Fallback> fallback = {});

/// Default compute dtype: CUDA bf16 if supported else fp16; MPS, MLX fp16; CPU bf16 where the ISA has
/// bf16 instructions, else fp32.
DType default_compute_dtype(Backend backend, bool cuda_has_bf16 = true);

QuantizationConfig get_recommended_config(Backend backend, double model_size_b = 7.0,
                                          double available_memory_gb = 16.0);

/// Decides layer by layer. Patterns match whole dotted components: a plain pattern matches a module
/// whose name equals it, begins with it, or (skip_modules) has it as consecutive components; `*` and
/// `?` make it a glob over the whole name; `re:` a regular expression over the whole name.
class LayerRules {
 public:
  explicit LayerRules(const QuantizationConfig& resolved);
  struct Choice {
    bool quantize = true;
    std::string reason;  ///< why not, naming the pattern
    QuantizeOptions options;
    DType compute_dtype = DType::kF32;
  };
  /// For the linear layer `name` with weight [out_features, in_features].
  Choice choose(const std::string& name, std::int64_t out_features, std::int64_t in_features);
  /// Patterns that matched no layer so far.
  std::vector<std::string> unmatched() const;

 private:
  QuantizationConfig config_;
  std::map<std::string, std::int64_t> hits_;
};

/// One row of a coverage report.
struct CoverageEntry {
  std::string name;
  std::string method;  ///< "hqq 4-bit g64", or "dense"
  std::string reason;  ///< why dense
  std::int64_t parameters = 0;
  std::int64_t bytes_before = 0;
  std::int64_t bytes_after = 0;
  double relative_error = 0;  ///< ||W - deq(W)||_F / ||W||_F
};
/// What happened to a model; same text in C++ and Python.
struct CoverageReport {
  std::vector<CoverageEntry> entries;
  std::vector<Substitution> substitutions;
  std::vector<std::string> unmatched_patterns;
  std::string to_text() const;  ///< table for a terminal, at most 100 columns wide
  std::string to_json() const;
};

}  // namespace quantal

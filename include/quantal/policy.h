// quantal policy: configuration, validation, recommendation and the choice of an adapter. The only
// room that may substitute one method for another, and it returns every substitution with a reason.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "quantal/core.h"
#include "quantal/coverage.h"
#include "quantal/formats.h"

namespace quantal {

/// "documented" follows the compatibility matrix of the documentation; "extended" allows every pair
/// that quantal's own kernels run.
enum class Support { kDocumented, kExtended };
/// What the factory does with an unsupported pair, and LayerRules with a layer that the dialect
/// cannot take: leave it dense, take the closest method, or throw.
enum class Fallback { kNone, kNearest, kError };

/// Settings of one layer pattern; unset members inherit from the config.
struct LayerOverride {
  std::optional<QuantizationMethod> method{};  ///< quantized with
  std::optional<int> bits{};                   ///< 16 leaves the layer dense
  std::optional<std::int64_t> group_size{};    ///< codes per scale
  std::optional<DType> compute_dtype{};        ///< of products
  std::optional<bool> double_quant{};          ///< bitsandbytes
  std::optional<std::string> quant_type{};     ///< bitsandbytes
  bool skip = false;                           ///< leave this layer dense
  std::string skip_reason{};  ///< set by decide_adapter where it had to skip; empty = asked for
};

/// The configuration of the public API (docs/api.md); same names, order and defaults as in Python.
struct QuantizationConfig {
  QuantizationMethod method = QuantizationMethod::BNB_NF4;  ///< what to quantize with
  int bits = 4;           ///< width; a method that names its width implies it
  bool bits_set = false;  ///< false while `bits` is only the default; any value but 4 counts as set
  std::int64_t group_size = 64;        ///< 0 = one group per row, where the dialect has it
  std::optional<DType> compute_dtype;  ///< of products; unset: by backend
  std::optional<DType> storage_dtype;  ///< a view of packed bytes, never a conversion
  bool double_quant = true;            ///< bitsandbytes: scales are quantized again
  bool double_quant_set = false;       ///< false while `double_quant` is only the default
  std::string quant_type = "nf4";      ///< bitsandbytes: "nf4" or "fp4"
  std::vector<std::string> skip_modules = {"lm_head"};               ///< patterns that stay dense
  std::vector<std::pair<std::string, LayerOverride>> layer_configs;  ///< in order given
  std::map<std::string, std::string> backend_options;                ///< docs/policy.md
  std::optional<std::int64_t> block_size;  ///< bitsandbytes: used instead of group_size if set
  std::optional<bool> quant_zero;          ///< HQQ: zeros in 8 bits, as older files have
  bool quant_scale = false;                ///< HQQ: scales in 8 bits, as older files have
  std::string custom_method;               ///< of register_custom_method; `method` is NONE then
  std::string note;  ///< no setting: get_recommended_config says here that its choice does not fit
};

/// Makes `name` a method that configs can name: JSON "method" then sets custom_method, and the
/// factory answers with `name` as the adapter, which whoever registered it makes. Such a method has
/// no rules but skip_modules, layer_configs and dtypes. Registering a name again changes nothing.
/// Throws Error{kConfig} unless it is lower-case letters, digits and underscores, and not built in.
void register_custom_method(const std::string& name);
bool is_custom_method(const std::string& name);  ///< whether it is registered
std::vector<std::string> custom_methods();       ///< in the order of registration

/// Throws Error{kConfig} where no config with these members may exist: a bit width other than 2, 4,
/// 8, 16 that the method does not have ("Unsupported bit width: {bits}. Supported: 2, 4, 8, 16"), a
/// negative group_size or block_size. Everything else is left to validate_quantization_config.
void check_config(const QuantizationConfig& config);

/// From a JSON object with the members of the Python dataclass; absent members keep their defaults.
///
/// "bits": null means unset, and an extra member "bits_set" may say so beside a number; the same
/// for "double_quant". "group_size": null means 0. Dtypes are names such as "float32". Values of
/// backend_options may be of any type and are kept as text. Members of a layer_configs entry are
/// those of LayerOverride, or null for "skip". Throws Error{kConfig} for text that is not such an
/// object, naming the member, for unknown members the nearest known one; and what check_config
/// throws.
QuantizationConfig config_from_json(const std::string& json);
/// Inverse of config_from_json: all members, one line.
std::string config_to_json(const QuantizationConfig& config);

/// One finding of validation.
struct Issue {
  std::string id;        ///< stable, e.g. "backend.bnb"; listed in docs/policy.md
  std::string severity;  ///< "error": not quantized as asked; "warning": works, but look
  std::string message;   ///< one sentence
  std::string remedy;    ///< what to do
};
/// A linear layer of a model: its dotted name, empty where only shapes are known, and the shape of
/// its weight.
struct LayerShape {
  std::string name;               ///< dotted
  std::int64_t out_features = 0;  ///< rows of the weight
  std::int64_t in_features = 0;   ///< columns of the weight
};
/// What validation may know besides the config.
struct ValidationFacts {
  std::optional<std::vector<LayerShape>>
      layers{};               ///< linear layers of the model; unset = no model
  bool cuda_has_bf16 = true;  ///< of the device that the config is for
};
/// All findings; empty = valid. Never throws for a config that check_config accepts. With layers,
/// group sizes are tried on every shape, and patterns on every name.
std::vector<Issue> validate_quantization_config(const QuantizationConfig& config, Backend backend,
                                                const ValidationFacts& facts = {});

/// True if the documented matrix has the pair. NONE is supported everywhere.
bool documented_support(Backend backend, QuantizationMethod method);
/// True if this version of quantal quantizes with the method. NONE counts as built.
bool method_built(QuantizationMethod method);
/// The documented matrix as a Markdown table, generated from the registry.
std::string compatibility_matrix_markdown();

/// What the factory decided.
struct Decision {
  std::string adapter;  ///< "BitsAndBytesAdapter", "HQQAdapter", "MLXAdapter", "QuantoAdapter",
                        ///< "FallbackAdapter", or the custom_method
  /// Resolved: bits of the method, compute_dtype of the backend, storage_dtype (uint8 for packed
  /// bytes), methods of layer_configs checked.
  /// Method NONE where nothing is quantized.
  QuantizationConfig config;
  std::vector<Substitution> substitutions;  ///< every change, in order
  std::vector<std::string> warnings;        ///< to be shown to the user once
};
/// Chooses the adapter for a pair.
///
/// A pair that is not supported gives FallbackAdapter, the closest method or Error{kUnsupported},
/// as `fallback` says. backend_options "support" and "fallback" are read where the arguments are
/// not given. Settings that no layer could use (group size, quant_type, axis) throw Error{kConfig};
/// bits that contradict the method throw only with Fallback::kError.
Decision decide_adapter(Backend backend, const QuantizationConfig& config,
                        std::optional<Support> support = {}, std::optional<Fallback> fallback = {});

/// Why an adapter cannot be constructed directly for this backend and config (not documented for
/// it, none of its methods is built, a method or width of others); empty if it can. Uses
/// backend_options "support" of the config. Throws Error{kConfig} for an unknown adapter name.
std::string adapter_refusal(std::string_view adapter, Backend backend,
                            const QuantizationConfig& config);

/// Default compute dtype: CUDA bf16 if supported else fp16; MPS, MLX fp16; CPU bf16 where the ISA
/// has bf16 instructions, else fp32.
DType default_compute_dtype(Backend backend, bool cuda_has_bf16 = true);

/// Share of the memory that a model may take: 0.65 on MPS and MLX, where the system lives in it
/// too, else 1.
double usable_memory_share(Backend backend) noexcept;

/// The documented rule of thumb, from weights alone (B = model size in 10^9 parameters, A = memory
/// in GB). CUDA: NONE if A >= 2.4 B, BNB_NF4 if A < 1.5 B, else BNB_INT8. MPS, MLX, with 0.65 A
/// usable: NONE if 2 B fits, MLX_INT8 if 1.5 B fits, else MLX_INT4. CPU: HQQ 8-bit if A < 2 B, else
/// NONE. Throws Error{kConfig} for sizes that are negative or not finite.
QuantizationConfig get_recommended_config(Backend backend, double model_size_b = 7.0,
                                          double available_memory_gb = 16.0,
                                          bool cuda_has_bf16 = true);
/// Empty if the weights of such a model fit into the memory with this config, else one sentence
/// with both figures (weights at bits / 8 bytes per parameter, 2 bytes where nothing is quantized).
std::string memory_note(const QuantizationConfig& config, double model_size_b,
                        double available_memory_gb);

/// A pattern over module names. Plain patterns match whole dotted components: `layers.2` never
/// matches `layers.23`. `*`, `?` and `[...]` make it a glob over the whole name (`*` crosses dots);
/// `re:` a regular expression (ECMAScript) that must match the whole name.
class NamePattern {
 public:
  /// kPrefix: equal or prefix. kAnywhere: also as consecutive components inside the name.
  enum class Plain { kPrefix, kAnywhere };
  /// Throws Error{kConfig} naming the pattern: empty, too long or not a regular expression.
  NamePattern(const std::string& text, Plain plain);
  bool matches(const std::string& name) const { return match_(name); }  ///< a dotted name
  const std::string& text() const { return text_; }                     ///< as it was given
  /// Literal characters of the pattern; of two matching patterns the one with more is meant.
  std::size_t specificity() const { return specificity_; }

 private:
  std::string text_;
  std::size_t specificity_ = 0;
  std::function<bool(const std::string&)> match_;
};

/// What backend_options "activations" come to for one form of weights.
struct ActivationChoice {
  Activations activations = Activations::kExact;  ///< what the product does
  std::string reason;  ///< why it is exact although int8 was asked for; else empty
};
/// Reads backend_options "activations" ("exact", the default, or "int8"). A form without such a
/// product keeps the exact one, with the reason; with fallback "error" that is Error{kUnsupported}.
/// Throws Error{kConfig} for another value, and for "int8" beside an int8_threshold.
ActivationChoice choose_activations(const QuantizationConfig& config, const PackedSpec& spec);

/// Decides layer by layer. skip_modules win over layer_configs (plain patterns of skip_modules
/// match anywhere, those of layer_configs from the start); of several matching layer_configs the
/// most specific one alone applies, of equally specific ones the later. Not thread-safe.
class LayerRules {
 public:
  /// `resolved` is Decision::config. Throws Error{kConfig} as NamePattern.
  explicit LayerRules(const QuantizationConfig& resolved);
  /// What happens to one layer.
  struct Choice {
    bool quantize = true;  ///< false: stays dense
    bool refused = false;  ///< not quantized because the dialect cannot take the layer
    std::string reason;    ///< why not, naming the pattern or what the dialect refused
    /// What to quantize with. value_dtype is the compute dtype, right for HQQ; a bitsandbytes layer
    /// dequantizes to the dtype of its own weight, which the caller sets.
    QuantizeOptions options;
    DType compute_dtype = DType::kF32;  ///< of products
    /// LLM.int8: outlier threshold of the layer's product; unset: exact weights.
    std::optional<double> int8_threshold;
    /// How the layer's product takes activations, with the reason where it is not what was asked.
    ActivationChoice activations;
  };
  /// For the linear layer `name` with weight [out_features, in_features]. A layer that the dialect
  /// cannot take is left dense with the reason; with fallback "error" it throws Error{kShape} or
  /// Error{kConfig} naming the layer.
  Choice choose(const std::string& name, std::int64_t out_features, std::int64_t in_features);
  /// Patterns that matched no layer so far, as "skip_modules: lm_hed"; the default skip_modules are
  /// never listed.
  std::vector<std::string> unmatched() const;

 private:
  struct Rule {
    NamePattern pattern;
    LayerOverride settings;
    std::int64_t hits = 0;
  };
  const Rule* best_override(const std::string& name);

  QuantizationConfig config_;
  std::vector<Rule> skips_, overrides_;
};

/// The threshold that backend_options "int8_threshold" ask for; unset without one. Throws
/// Error{kConfig} for what is no number >= 0.
std::optional<double> int8_threshold(const QuantizationConfig& config);

}  // namespace quantal

#include "policy/methods.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "policy/text.h"

namespace quantal::policy {
namespace {

using M = QuantizationMethod;

constexpr std::array<int, 7> kHqqWidths = {1, 2, 3, 4, 5, 6, 8};
constexpr std::array<FamilyFacts, 4> kFamilies = {{
    {"bnb", "BitsAndBytesAdapter", "bitsandbytes", "CUDA", "CUDA backend", {}},
    {"hqq", "HQQAdapter", "HQQ", "", "", kHqqWidths},
    {"mlx", "MLXAdapter", "MLX", "Apple Silicon", "Apple Silicon (MLX/MPS backends)", {}},
    {"quanto", "QuantoAdapter", "Quanto", "", "", {}},
}};
constexpr FamilyFacts kNoFamily = {"", "FallbackAdapter", "", "", "", {}};

constexpr std::array<std::string_view, 2> kSupportNames = {"documented", "extended"};
constexpr std::array<std::string_view, 3> kFallbackNames = {"none", "nearest", "error"};
constexpr std::array<std::string_view, 8> kOptions = {"int8_threshold", "support",    "fallback",
                                                      "axis",           "optimize",   "round_zero",
                                                      "mode",           "activations"};
constexpr std::array<std::string_view, 2> kActivationNames = {"exact", "int8"};

/// Rows, and groups per row, of the layer on which settings are tried.
constexpr std::int64_t kMaxProbe = 4096;

/// Index of the option's value in `legal`; nullopt if the option is absent.
std::optional<std::size_t> option_index(const QuantizationConfig& config, const char* key,
                                        std::span<const std::string_view> legal) {
  const auto found = config.backend_options.find(key);
  if (found == config.backend_options.end()) return std::nullopt;
  for (std::size_t i = 0; i < legal.size(); ++i) {
    if (found->second == legal[i]) return i;
  }
  fail(Errc::kConfig, std::string("backend_options: ") + key + " is '" + found->second +
                          "', expected one of " + join(legal));
}

/// Booleans as Python, JSON and people write them.
std::optional<bool> bool_option(const QuantizationConfig& config, const char* key) {
  static constexpr std::array<std::string_view, 6> kWords = {"false", "true", "False",
                                                             "True",  "0",    "1"};
  const auto index = option_index(config, key, kWords);
  if (!index) return std::nullopt;
  return *index % 2 == 1;
}

}  // namespace

const FamilyFacts& family_of(QuantizationMethod method) {
  const std::string_view dialect = methods()[static_cast<std::size_t>(method)].dialect;
  for (const FamilyFacts& family : kFamilies) {
    if (family.dialect == dialect) return family;
  }
  return kNoFamily;
}

const FamilyFacts* find_adapter(std::string_view adapter) {
  for (const FamilyFacts& family : kFamilies) {
    if (family.adapter == adapter) return &family;
  }
  return nullptr;
}

bool is_bnb(QuantizationMethod method) { return family_of(method).dialect == "bnb"; }

std::vector<int> upstream_bits(QuantizationMethod method) {
  if (const std::optional<int> implied = method_bits(method)) return {*implied};
  const std::span<const int> widths = family_of(method).widths;
  return {widths.begin(), widths.end()};
}

std::span<const int> built_bits(QuantizationMethod method) {
  const Dialect* dialect = find_dialect(method);
  return dialect == nullptr ? std::span<const int>{} : dialect->bits;
}

bool has_width(std::span<const int> widths, int bits) {
  return std::find(widths.begin(), widths.end(), bits) != widths.end();
}

QuantizationMethod sibling_with_bits(QuantizationMethod method, int bits) {
  if (method_bits(method).value_or(bits) == bits) return method;
  for (const MethodInfo& candidate : methods()) {
    if (candidate.dialect == family_of(method).dialect && candidate.bits == bits) {
      return candidate.method;
    }
  }
  return method;
}

std::string width_refusal(QuantizationMethod method, int bits) {
  const QuantizationMethod sibling = sibling_with_bits(method, bits);
  std::string reason = build_refusal(sibling, bits);
  if (reason.empty() && method_bits(sibling).value_or(bits) != bits) {
    reason = std::string(method_name(sibling)) + " has no " + std::to_string(bits) + "-bit form";
  }
  return reason;
}

int effective_bits(QuantizationMethod method, int bits) {
  return method_bits(method).value_or(bits);
}

bool bits_given(const QuantizationConfig& config) {
  return config.bits_set || config.bits != QuantizationConfig{}.bits;
}

std::string bits_conflict(const QuantizationConfig& config) {
  const std::optional<int> implied = method_bits(config.method);
  if (!implied || !bits_given(config) || config.bits == *implied) return {};
  return "method " + std::string(method_name(config.method)) + " has " + std::to_string(*implied) +
         " bits, not " + std::to_string(config.bits);
}

std::string matrix_refusal(Backend backend, QuantizationMethod method) {
  if (documented_support(backend, method)) return {};
  const FamilyFacts& family = family_of(method);
  std::string text(family.title);
  if (family.only_on.empty()) {
    text += " quantization is not supported on ";
  } else {
    text += " quantization is only supported on " + std::string(family.only_on) + ", not ";
  }
  return text + std::string(backend_name(backend));
}

std::string build_refusal(QuantizationMethod method, int bits) {
  if (method == M::NONE) return {};
  const std::span<const int> built = built_bits(method);
  if (built.empty()) {
    return std::string(method_name(method)) + " is not built in this version of quantal";
  }
  if (has_width(built, bits)) return {};
  const bool exists = has_width(upstream_bits(method), bits);
  return std::string(method_name(method)) + " with " + std::to_string(bits) + " bits " +
         (exists ? "is not built in this version of quantal" : "does not exist") +
         ", which has bits " + join(built);
}

std::optional<Support> support_option(const QuantizationConfig& config) {
  const auto index = option_index(config, "support", kSupportNames);
  if (!index) return std::nullopt;
  return *index == 0 ? Support::kDocumented : Support::kExtended;
}

std::optional<Fallback> fallback_option(const QuantizationConfig& config) {
  const auto index = option_index(config, "fallback", kFallbackNames);
  if (!index) return std::nullopt;
  return static_cast<Fallback>(*index);
}

std::string_view support_name(Support support) {
  return kSupportNames[static_cast<std::size_t>(support)];
}

std::string_view fallback_name(Fallback fallback) {
  return kFallbackNames[static_cast<std::size_t>(fallback)];
}

QuantizeOptions base_options(const QuantizationConfig& config) {
  static constexpr std::array<std::string_view, 2> kAxes = {"0", "1"};
  QuantizeOptions options;
  options.method = config.method;
  options.bits = effective_bits(config.method, config.bits);
  options.group_size = config.group_size;
  if (is_bnb(config.method) && config.block_size) {
    options.group_size = *config.block_size;
  }
  options.value_dtype = config.compute_dtype.value_or(DType::kF32);
  options.double_quant = config.double_quant;
  options.quant_type = config.quant_type;
  options.axis = static_cast<int>(option_index(config, "axis", kAxes).value_or(1));
  options.optimize = bool_option(config, "optimize").value_or(true);
  options.round_zero = bool_option(config, "round_zero");
  options.quant_zero = config.quant_zero;
  if (config.quant_scale) options.quant_scale = true;
  static_cast<void>(int8_threshold(config));  // refuses what is no threshold
  static_cast<void>(activations_option(config));
  const auto mode = config.backend_options.find("mode");
  if (mode != config.backend_options.end()) options.mode = mode->second;
  return options;
}

std::span<const std::string_view> known_options() { return kOptions; }

std::string storage_refusal(DType dtype) {
  static constexpr std::array<DType, 4> kLegal = {DType::kU8, DType::kF16, DType::kBF16,
                                                  DType::kF32};
  if (std::find(kLegal.begin(), kLegal.end(), dtype) != kLegal.end()) return {};
  return "storage_dtype is " + std::string(dtype_torch_name(dtype)) +
         ", expected uint8, float16, bfloat16 or float32";
}

std::string setting_refusal(const QuantizeOptions& options) {
  try {
    static_cast<void>(probe_spec(options));
  } catch (const Error& refusal) {
    return refusal.what();
  }
  return {};
}

std::optional<PackedSpec> probe_spec(const QuantizeOptions& options) {
  const Dialect* dialect = find_dialect(options.method);
  if (dialect == nullptr) return std::nullopt;
  // A layer that every legal group size divides: what refuses it refuses all layers.
  const std::int64_t unit = std::clamp<std::int64_t>(options.group_size, 1, kMaxProbe);
  return dialect->make_spec(kMaxProbe, kMaxProbe * unit, options);
}

Activations activations_option(const QuantizationConfig& config) {
  const auto found = config.backend_options.find("activations");
  if (found != config.backend_options.end() && found->second == "null") return Activations::kExact;
  const auto index = option_index(config, "activations", kActivationNames).value_or(0);
  const auto asked = static_cast<Activations>(index);
  if (asked == Activations::kInt8 && int8_threshold(config)) {
    fail(Errc::kConfig,
         "backend_options: activations is 'int8' beside an int8_threshold, expected one of the two "
         "(int8_threshold is the product of LLM.int8)");
  }
  return asked;
}

}  // namespace quantal::policy

namespace quantal {

bool documented_support(Backend backend, QuantizationMethod method) {
  if (method == QuantizationMethod::NONE) return true;
  return ((documented_backends(method) >> static_cast<unsigned>(backend)) & 1u) != 0;
}

bool method_built(QuantizationMethod method) {
  return method == QuantizationMethod::NONE || find_dialect(method) != nullptr;
}

std::optional<double> int8_threshold(const QuantizationConfig& config) {
  const auto found = config.backend_options.find("int8_threshold");
  if (found == config.backend_options.end() || found->second == "null") return std::nullopt;
  const std::string& text = found->second;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size() && std::isfinite(value) &&
      value >= 0) {
    return value;
  }
  fail(Errc::kConfig, "backend_options: int8_threshold is '" + text.substr(0, 80) +
                          "', expected a number >= 0 (6 upstream)");
}

ActivationChoice choose_activations(const QuantizationConfig& config, const PackedSpec& spec) {
  if (policy::activations_option(config) == Activations::kExact) return {};
  std::string refusal = int8_activations_refusal(spec);
  if (refusal.empty()) return {.activations = Activations::kInt8, .reason = {}};
  refusal = "activations stay exact: " + refusal;
  if (policy::fallback_option(config) == Fallback::kError) fail(Errc::kUnsupported, refusal);
  return {.activations = Activations::kExact, .reason = std::move(refusal)};
}

std::string describe_options(const QuantizeOptions& options) {
  std::string text(method_name(options.method));
  text += " " + std::to_string(options.bits) + "-bit";
  if (options.method == QuantizationMethod::BNB_INT8) return text;  // a scale per row
  text += " g" + std::to_string(options.group_size);
  if (policy::is_bnb(options.method)) {
    if (options.quant_type != "nf4") text += " " + options.quant_type;
    if (options.double_quant) text += " double";
  }
  return text;
}

}  // namespace quantal

// What policy knows about methods beyond the registry: the adapter class that carries a method in
// the public API, its family, and the wording of refusals.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/policy.h"

namespace quantal::policy {

/// What the public API and messages call the methods of one dialect.
struct FamilyFacts {
  std::string_view dialect;     ///< as in MethodInfo; empty for NONE
  std::string_view adapter;     ///< class name
  std::string_view title;       ///< "bitsandbytes", "MLX" ...
  std::string_view only_on;     ///< "CUDA", "Apple Silicon": wording of a refusal; may be empty
  std::string_view direct_on;   ///< the same where an adapter is constructed directly
  std::span<const int> widths;  ///< upstream's widths where a method's name leaves them free
};
/// Facts of the method's family; for NONE, FallbackAdapter and empty members.
const FamilyFacts& family_of(QuantizationMethod method);
/// nullptr if no family has an adapter of this name.
const FamilyFacts* find_adapter(std::string_view adapter);
bool is_bnb(QuantizationMethod method);

/// Widths that upstream has for a method: the one that its name implies, else those of the family.
std::vector<int> upstream_bits(QuantizationMethod method);
/// Widths that this version quantizes to; empty if the method is not built.
std::span<const int> built_bits(QuantizationMethod method);
bool has_width(std::span<const int> widths, int bits);

/// Another method of the same dialect whose name has these bits (bnb_nf4 and 8 bits: bnb_int8),
/// else `method` itself.
QuantizationMethod sibling_with_bits(QuantizationMethod method, int bits);
/// Why a layer cannot have this width with a method or its sibling; empty if it can.
std::string width_refusal(QuantizationMethod method, int bits);

/// Bits that a config means: those of the method where it names them, else those of the config.
int effective_bits(QuantizationMethod method, int bits);
/// True if the user gave `bits` (see QuantizationConfig::bits_set).
bool bits_given(const QuantizationConfig& config);
/// "method bnb_nf4 has 4 bits, not 8" if the given bits contradict the method, else empty.
std::string bits_conflict(const QuantizationConfig& config);

/// Why the documented matrix refuses a pair, e.g. "bitsandbytes quantization is only supported on
/// CUDA, not cpu"; empty if it allows it.
std::string matrix_refusal(Backend backend, QuantizationMethod method);
/// Why this version cannot quantize to a width; empty if it can (always for NONE).
std::string build_refusal(QuantizationMethod method, int bits);

/// Settings behind backend_options; throw Error{kConfig} naming option, value and legal values.
std::optional<Support> support_option(const QuantizationConfig& config);
std::optional<Fallback> fallback_option(const QuantizationConfig& config);
Activations activations_option(const QuantizationConfig& config);
std::string_view support_name(Support support);
std::string_view fallback_name(Fallback fallback);

/// Fills QuantizeOptions from a resolved config, without layer_configs. Throws Error{kConfig} for
/// an illegal "axis", "optimize" or "round_zero" in backend_options.
QuantizeOptions base_options(const QuantizationConfig& config);

/// The config as a layer with these settings sees it.
QuantizationConfig apply_override(const QuantizationConfig& config, const LayerOverride& layer);

/// Names that backend_options may hold.
std::span<const std::string_view> known_options();

/// "" or why packed bytes cannot be stored under this dtype.
std::string storage_refusal(DType dtype);

/// "" or why the dialect of `options.method` refuses group size or quant_type for every layer.
std::string setting_refusal(const QuantizeOptions& options);
/// The form of a layer that every legal group size divides; nothing where the method is not built.
/// Throws what the dialect refuses.
std::optional<PackedSpec> probe_spec(const QuantizeOptions& options);

}  // namespace quantal::policy

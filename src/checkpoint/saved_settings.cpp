// What a file says about its layers, beside what a config asks for. The file wins.
#include "checkpoint/saved_settings.h"

#include <algorithm>
#include <utility>

#include "quantal/transcode.h"

namespace quantal::checkpoint {
namespace {

struct Difference {
  std::string what, asked, used;
  bool operator==(const Difference&) const = default;
};

/// The same difference in several layers.
struct Shared {
  Difference difference;
  std::string first;
  std::int64_t count = 0;
};

std::string method_word(const QuantizeOptions& options, const PackedSpec& form) {
  return options.method == QuantizationMethod::NONE ? describe_form(form)
                                                    : std::string(method_name(options.method));
}

std::string yes(bool value) { return value ? "true" : "false"; }

bool has_nested(const PackedSpec& form) { return form.scale == ScaleSource::kNestedU8; }

/// Differences between two forms of one method.
std::vector<Difference> form_differences(const PackedSpec& asked, const PackedSpec& used) {
  std::vector<Difference> out;
  if (asked.bits != used.bits) {
    out.push_back({"bits", std::to_string(asked.bits), std::to_string(used.bits)});
  }
  if (asked.group_size != used.group_size) {
    out.push_back(
        {"group_size", std::to_string(asked.group_size), std::to_string(used.group_size)});
  }
  const std::string a = options_of(asked).quant_type, b = options_of(used).quant_type;
  if (a != b) out.push_back({"quant_type", a, b});
  if (has_nested(asked) != has_nested(used)) {
    out.push_back({"double_quant", yes(has_nested(asked)), yes(has_nested(used))});
  }
  const std::string form = describe_form(asked), other = describe_form(used);
  if (out.empty() && form != other) out.push_back({"form", form, other});
  return out;
}

std::vector<Difference> differences_of(LayerRules& rules, const SavedLayer& layer, bool any) {
  LayerRules::Choice choice = rules.choose(layer.name, layer.rows, layer.cols);
  const bool none = choice.options.method == QuantizationMethod::NONE;
  if (!layer.form) {
    if (!choice.quantize) return {};
    return {{any ? "skip_modules" : "method", describe_options(choice.options), "dense"}};
  }
  const QuantizeOptions used = options_of(*layer.form);
  if (!choice.quantize && !none) return {{"skip_modules", "dense", method_word(used, *layer.form)}};
  const Dialect* dialect = none ? nullptr : find_dialect(choice.options.method);
  if (dialect == nullptr || choice.options.method != used.method) {
    return {{"method", std::string(method_name(choice.options.method)),
             method_word(used, *layer.form)}};
  }
  choice.options.value_dtype = layer.form->value_dtype;
  return form_differences(dialect->make_spec(layer.rows, layer.cols, choice.options), *layer.form);
}

}  // namespace

std::vector<Substitution> saved_settings(const QuantizationConfig& config,
                                         const std::vector<SavedLayer>& layers) {
  QuantizationConfig lenient = config;
  lenient.backend_options.erase("fallback");  // nothing is quantized here, so nothing can fail
  LayerRules rules(lenient);
  const bool any = std::any_of(layers.begin(), layers.end(),
                               [](const SavedLayer& layer) { return layer.form.has_value(); });
  std::vector<Shared> found;
  for (const SavedLayer& layer : layers) {
    for (Difference& difference : differences_of(rules, layer, any)) {
      auto same = std::find_if(found.begin(), found.end(),
                               [&](const Shared& s) { return s.difference == difference; });
      if (same == found.end()) {
        same = found.insert(found.end(), Shared{std::move(difference), layer.name, 0});
      }
      ++same->count;
    }
  }
  std::vector<Substitution> out;
  for (const Shared& s : found) {
    const std::string layers_word = std::to_string(s.count) + (s.count == 1 ? " layer" : " layers");
    out.push_back({s.difference.what, s.difference.asked, s.difference.used,
                   "the file says so (" + layers_word + ", first '" + s.first + "')"});
  }
  return out;
}

}  // namespace quantal::checkpoint

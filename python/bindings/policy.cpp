// Bindings of policy.h: configurations travel as JSON, everything else as plain values.
#include "quantal/policy.h"

#include <tuple>

#include "bindings/bindings.h"
#include "quantal/attention_choice.h"
#include "quantal/formats.h"
#include "quantal/merge_report.h"
#include "quantal/transcode.h"

namespace quantal::python {

std::optional<Support> parse_support(const std::optional<std::string>& text) {
  if (!text) return std::nullopt;
  if (*text == "documented") return Support::kDocumented;
  if (*text == "extended") return Support::kExtended;
  fail(Errc::kConfig,
       "policy: support is \"" + *text + "\", expected \"documented\" or \"extended\"");
}

std::optional<Fallback> parse_fallback(const std::optional<std::string>& text) {
  if (!text) return std::nullopt;
  if (*text == "none") return Fallback::kNone;
  if (*text == "nearest") return Fallback::kNearest;
  if (*text == "error") return Fallback::kError;
  fail(Errc::kConfig,
       "policy: fallback is \"" + *text + "\", expected \"none\", \"nearest\" or \"error\"");
}

namespace {

using Strings = std::vector<std::string>;

py::dict to_dict(const Substitution& s) {
  return py::dict(py::arg("what") = s.what, py::arg("asked") = s.asked, py::arg("used") = s.used,
                  py::arg("reason") = s.reason);
}

py::list to_list(const std::vector<Substitution>& substitutions) {
  py::list out;
  for (const Substitution& s : substitutions) out.append(to_dict(s));
  return out;
}

using NamedShape = std::tuple<std::string, std::int64_t, std::int64_t>;

ValidationFacts to_facts(const std::optional<std::vector<NamedShape>>& layers, bool cuda_has_bf16) {
  ValidationFacts facts;
  facts.cuda_has_bf16 = cuda_has_bf16;
  if (!layers) return facts;
  facts.layers.emplace();
  for (const auto& [name, rows, cols] : *layers) facts.layers->push_back({name, rows, cols});
  return facts;
}

py::list validate(const std::string& config_json, const std::string& backend,
                  const std::optional<std::vector<NamedShape>>& layers, bool cuda_has_bf16) {
  py::list out;
  for (const Issue& i :
       validate_quantization_config(config_from_json(config_json), parse_backend(backend),
                                    to_facts(layers, cuda_has_bf16))) {
    out.append(py::dict(py::arg("id") = i.id, py::arg("severity") = i.severity,
                        py::arg("message") = i.message, py::arg("remedy") = i.remedy));
  }
  return out;
}

py::dict decide(const std::string& backend, const std::string& config_json,
                const std::optional<std::string>& support,
                const std::optional<std::string>& fallback) {
  const Decision d = decide_adapter(parse_backend(backend), config_from_json(config_json),
                                    parse_support(support), parse_fallback(fallback));
  return py::dict(py::arg("adapter") = d.adapter, py::arg("config") = config_to_json(d.config),
                  py::arg("substitutions") = to_list(d.substitutions),
                  py::arg("warnings") = d.warnings);
}

Strings method_names() {
  Strings out;
  for (const MethodInfo& info : methods()) out.emplace_back(info.enum_name);
  return out;
}

Strings built_methods() {
  Strings out;
  for (const MethodInfo& info : methods()) {
    if (method_built(info.method)) out.emplace_back(info.name);
  }
  return out;
}

void bind_rules(py::module_& m) {
  py::class_<LayerRules::Choice>(m, "Choice")
      .def_readonly("quantize", &LayerRules::Choice::quantize)
      .def_readonly("reason", &LayerRules::Choice::reason)
      .def_readonly("options", &LayerRules::Choice::options)
      .def_property_readonly(
          "method", [](const LayerRules::Choice& c) { return describe_options(c.options); })
      .def_property_readonly("compute_dtype", [](const LayerRules::Choice& c) {
        return std::string(dtype_name(c.compute_dtype));
      });
  py::class_<LayerRules>(m, "LayerRules")
      .def(py::init([](const std::string& json, const std::string& custom_method) {
             QuantizationConfig config = config_from_json(json);
             if (!custom_method.empty()) {
               config.method = QuantizationMethod::NONE;
               config.custom_method = custom_method;
             }
             return LayerRules(config);
           }),
           py::arg("config_json"), py::arg("custom_method") = "")
      .def("choose", &LayerRules::choose, py::arg("name"), py::arg("out_features"),
           py::arg("in_features"))
      .def("unmatched", &LayerRules::unmatched);
  m.def(
      "choose_activations",
      [](const std::string& config_json, const std::vector<std::int64_t>& spec) {
        const auto choice = choose_activations(config_from_json(config_json), spec_from_ints(spec));
        return std::pair(choice.activations == Activations::kInt8, choice.reason);
      },
      py::arg("config_json"), py::arg("spec"),
      "(int8 activations?, why not although they were asked for) of a form of weights.");
  m.def(
      "int8_activations_refusal",
      [](const std::vector<std::int64_t>& spec) {
        return int8_activations_refusal(spec_from_ints(spec));
      },
      py::arg("spec"), "Why a form has no product with int8 activations, or an empty text.");
}

void bind_attention(py::module_& m) {
  m.def(
      "attention_refusal",
      [](const std::vector<std::int64_t>& q, const std::vector<std::int64_t>& k,
         const std::vector<std::int64_t>& v, const std::string& dtype, bool causal,
         bool with_gradient) {
        return attention_refusal(attention_shape(q, k, v, causal, 1), parse_dtype(dtype),
                                 with_gradient);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("dtype"), py::arg("causal"),
      py::arg("with_gradient"),
      "Why quantal's kernels do not take an attention of tensors of these sizes, or an empty text; "
      "ShapeError for sizes that do not belong together.");
  m.def(
      "attention_gain_refusal",
      [](std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, const std::string& dtype,
         bool training) {
        const auto use = training ? AttentionUse::kTraining : AttentionUse::kInference;
        return attention_gain_refusal(heads, kv_heads, dim, parse_dtype(dtype), use);
      },
      py::arg("heads"), py::arg("kv_heads"), py::arg("dim"), py::arg("dtype"), py::arg("training"),
      "Why a model with such heads has nothing from quantal's attention, or an empty text.");
}

void bind_report(py::module_& m) {
  py::class_<CoverageReport>(m, "CoverageReport")
      .def(py::init<>())
      .def("add",
           [](CoverageReport& r, const std::string& name, const std::string& method,
              const std::string& reason, std::int64_t parameters, std::int64_t bytes_before,
              std::int64_t bytes_after, double relative_error) {
             r.entries.push_back(
                 {name, method, reason, parameters, bytes_before, bytes_after, relative_error});
           })
      .def("add_substitution",
           [](CoverageReport& r, const std::string& what, const std::string& asked,
              const std::string& used, const std::string& reason) {
             r.substitutions.push_back({what, asked, used, reason});
           })
      .def_readwrite("unmatched_patterns", &CoverageReport::unmatched_patterns)
      .def_readwrite("notes", &CoverageReport::notes)
      .def("to_text", &CoverageReport::to_text)
      .def("to_json", &CoverageReport::to_json);
}

void bind_merge_report(py::module_& m) {
  using Row = std::tuple<std::string, std::int64_t, std::int64_t, double, double, double>;
  py::class_<MergeReport>(m, "MergeReport")
      .def(py::init([](const std::vector<Row>& rows) {
        MergeReport report;
        for (const auto& [name, codes, changed, norm, surviving, noise] : rows) {
          report.layers.push_back({name, codes, changed, norm, surviving, noise});
        }
        return report;
      }))
      .def("codes", &MergeReport::codes)
      .def("codes_changed", &MergeReport::codes_changed)
      .def("surviving", &MergeReport::surviving)
      .def("noise", &MergeReport::noise)
      .def("to_text", &MergeReport::to_text)
      .def("to_json", &MergeReport::to_json);
}

/// The threshold with which a layer of this form multiplies; none but for LLM.int8.
std::optional<double> layer_int8_threshold(const std::vector<std::int64_t>& spec,
                                           const std::string& value) {
  if (options_of(spec_from_ints(spec)).method != QuantizationMethod::BNB_INT8) return std::nullopt;
  QuantizationConfig config;
  config.backend_options["int8_threshold"] = value;
  return int8_threshold(config);
}

}  // namespace

void bind_policy(py::module_& m) {
  bind_merge_report(m);
  m.def("int8_threshold", &layer_int8_threshold);
  m.def("method_names", &method_names);
  m.def("built_methods", &built_methods,
        "Values of the methods that this build can quantize with.");
  m.def("parse_method", [](const std::string& name) {
    return is_custom_method(name) ? name : std::string(method_name(parse_method(name)));
  });
  m.def("register_custom_method", &register_custom_method);
  m.def("custom_methods", &custom_methods);
  m.def("parse_backend",
        [](const std::string& name) { return std::string(backend_name(parse_backend(name))); });
  m.def("normalize_config",
        [](const std::string& json) { return config_to_json(config_from_json(json)); });
  m.def("keeps_weight_dtype", [](const std::string& method) {
    return dialect_of(parse_method(method)).keeps_weight_dtype;
  });
  m.def("validate", &validate, py::arg("config_json"), py::arg("backend"),
        py::arg("layers") = py::none(), py::arg("cuda_has_bf16") = true);
  m.def("decide_adapter", &decide, py::arg("backend"), py::arg("config_json"),
        py::arg("support") = py::none(), py::arg("fallback") = py::none());
  m.def("documented_support", [](const std::string& backend, const std::string& method) {
    return documented_support(parse_backend(backend), parse_method(method));
  });
  m.def("compatibility_matrix_markdown", &compatibility_matrix_markdown);
  m.def("default_compute_dtype", [](const std::string& backend, bool cuda_has_bf16) {
    return std::string(dtype_name(default_compute_dtype(parse_backend(backend), cuda_has_bf16)));
  });
  m.def("recommended_config", [](const std::string& backend, double model_size_b,
                                 double available_memory_gb, bool cuda_has_bf16) {
    return config_to_json(get_recommended_config(parse_backend(backend), model_size_b,
                                                 available_memory_gb, cuda_has_bf16));
  });
  m.def("memory_note", [](const std::string& json, double model_size_b, double memory_gb) {
    return memory_note(config_from_json(json), model_size_b, memory_gb);
  });
  m.def("adapter_refusal",
        [](const std::string& adapter, const std::string& backend, const std::string& json) {
          return adapter_refusal(adapter, parse_backend(backend), config_from_json(json));
        });
  bind_rules(m);
  bind_attention(m);
  bind_report(m);
}

}  // namespace quantal::python

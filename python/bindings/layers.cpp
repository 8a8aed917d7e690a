// Bindings of formats.h and kernels.h for one layer: specs, upstream tensors in and out.
#include <map>

#include "bindings/bindings.h"
#include "quantal/formats.h"
#include "quantal/transcode.h"

namespace quantal::python {
namespace {

using Spec = std::vector<std::int64_t>;

Spec to_ints(const PackedSpec& spec) {
  const auto ints = spec_to_ints(spec);
  return {ints.begin(), ints.end()};
}

py::tuple packed_to_python(PackedMatrix packed) {
  const PackedLayout layout = layout_of(packed.spec);
  const auto buffer = [](std::vector<std::uint8_t> bytes) {
    return std::make_shared<Buffer>(Buffer{std::move(bytes)});
  };
  const Spec spec = to_ints(packed.spec);
  return py::make_tuple(
      spec, py::make_tuple(packed.spec.rows, layout.code_bytes, buffer(std::move(packed.codes))),
      py::make_tuple(layout.stat_rows, layout.stat_bytes, buffer(std::move(packed.stats))),
      buffer(std::move(packed.shared)));
}

/// `dialect` names one without a method of its own, or one whose widths go beyond its methods.
Spec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options,
               const std::optional<std::string>& dialect) {
  const Dialect& d = dialect ? dialect_by_name(*dialect) : dialect_of(options.method);
  return to_ints(d.make_spec(rows, cols, options));
}

py::dict layout(const Spec& ints) {
  const PackedSpec spec = spec_from_ints(ints);
  const PackedLayout l = layout_of(spec);
  return py::dict(py::arg("codes") = py::make_tuple(spec.rows, l.code_bytes),
                  py::arg("stats") = py::make_tuple(l.stat_rows, l.stat_bytes),
                  py::arg("shared") = py::make_tuple(l.shared_bytes),
                  py::arg("row_runs") = spec.group_map == GroupMap::kRowRuns,
                  py::arg("total_bytes") = l.total_bytes(spec));
}

py::dict describe(const Spec& ints) {
  const PackedSpec spec = spec_from_ints(ints);
  const QuantizeOptions options = options_of(spec);
  return py::dict(py::arg("rows") = spec.rows, py::arg("cols") = spec.cols,
                  py::arg("bits") = spec.bits, py::arg("group_size") = spec.group_size,
                  py::arg("value_dtype") = std::string(dtype_name(spec.value_dtype)),
                  py::arg("dialect") = std::string(dialect_by_id(spec.dialect).name),
                  py::arg("method") = std::string(method_name(options.method)),
                  py::arg("quant_type") = options.quant_type,
                  py::arg("double_quant") = options.double_quant,
                  py::arg("form") = describe_form(spec));
}

py::dict export_layer(const Spec& ints, const py::buffer& codes, const py::buffer& stats,
                      const py::buffer& shared, const std::string& prefix) {
  const BytesIn c(codes), s(stats), h(shared);
  const PackedView view{spec_from_ints(ints), c.view(), s.view(), h.view()};
  std::vector<NamedTensor> tensors;
  {
    py::gil_scoped_release released;
    check_packed(view);
    tensors = dialect_by_id(view.spec.dialect).export_layer(view, prefix);
  }
  py::dict out;
  for (NamedTensor& t : tensors) out[py::str(t.name)] = to_python(std::move(t.tensor));
  return out;
}

py::tuple import_layer(const std::string& dialect, const std::string& prefix,
                       const std::map<std::string, py::tuple>& tensors, const std::string& settings,
                       const Spec& weight_shape) {
  std::vector<BytesIn> held;
  held.reserve(tensors.size());
  std::map<std::string, TensorView> views;
  for (const auto& [name, parts] : tensors) {
    held.emplace_back(parts[2].cast<py::buffer>());
    views[name] = {parse_dtype(parts[0].cast<std::string>()), parts[1].cast<Spec>(),
                   held.back().view()};
  }
  const TensorLookup lookup = [&views](const std::string& name) -> const TensorView* {
    const auto found = views.find(name);
    return found == views.end() ? nullptr : &found->second;
  };
  const Dialect& d = dialect_by_name(dialect);
  PackedMatrix packed;
  {
    py::gil_scoped_release released;
    packed = d.import_layer(prefix, lookup, {settings, weight_shape});
  }
  return packed_to_python(std::move(packed));
}

void bind_options(py::module_& m) {
  using O = QuantizeOptions;
  py::class_<O>(m, "QuantizeOptions")
      .def(py::init<>())
      .def_property(
          "method", [](const O& o) { return std::string(method_name(o.method)); },
          [](O& o, const std::string& name) { o.method = parse_method(name); })
      .def_readwrite("bits", &O::bits)
      .def_readwrite("group_size", &O::group_size)
      .def_property(
          "value_dtype", [](const O& o) { return std::string(dtype_name(o.value_dtype)); },
          [](O& o, const std::string& name) { o.value_dtype = parse_dtype(name); })
      .def_readwrite("double_quant", &O::double_quant)
      .def_readwrite("quant_type", &O::quant_type)
      .def_readwrite("axis", &O::axis)
      .def_readwrite("optimize", &O::optimize)
      .def_readwrite("round_zero", &O::round_zero)
      .def_readwrite("quant_zero", &O::quant_zero)
      .def_readwrite("quant_scale", &O::quant_scale)
      .def_readwrite("mode", &O::mode);
}

}  // namespace

void bind_layers(py::module_& m) {
  py::class_<OwnedTensor>(m, "OwnedTensor")
      .def_readonly("dtype", &OwnedTensor::dtype)
      .def_readonly("shape", &OwnedTensor::shape)
      .def_readonly("data", &OwnedTensor::data);
  bind_options(m);
  m.def("make_spec", &make_spec, py::arg("rows"), py::arg("cols"), py::arg("options"),
        py::arg("dialect") = py::none());
  m.def("layout", &layout, py::arg("spec"), "Shapes and bytes of the buffers of a packed matrix.");
  m.def("describe", &describe, py::arg("spec"));
  m.def("dialects", [] {
    std::vector<std::string> out;
    for (const Dialect* d : dialects()) out.emplace_back(d->name);
    return out;
  });
  m.def("export_layer", &export_layer, py::arg("spec"), py::arg("codes"), py::arg("stats"),
        py::arg("shared"), py::arg("prefix"));
  m.def("import_layer", &import_layer, py::arg("dialect"), py::arg("prefix"), py::arg("tensors"),
        py::arg("settings") = "{}", py::arg("weight_shape") = Spec{});
  m.def("cpu_kernels", [] { return std::string(active_cpu_kernels()); });
  m.def("available_cpu_kernels", [] {
    std::vector<std::string> out;
    for (const auto name : available_cpu_kernels()) out.emplace_back(name);
    return out;
  });
}

}  // namespace quantal::python

// Bindings of quantal/checkpoint.h, conversion: options in, a report of plain values out.
#include <pybind11/functional.h>

#include <optional>

#include "bindings/bindings.h"
#include "quantal/checkpoint.h"

namespace quantal::python {
namespace {

py::dict to_dict(const ConvertReport::Layer& layer) {
  const Preservation& kept = layer.kept;
  return py::dict(py::arg("name") = layer.name, py::arg("source") = layer.from,
                  py::arg("target") = layer.to, py::arg("codes") = kept.codes,
                  py::arg("statistics") = kept.statistics,
                  py::arg("statistics_ulp") = kept.statistics_ulp, py::arg("values") = kept.values,
                  py::arg("values_dtype") = std::string(dtype_torch_name(kept.values_dtype)),
                  py::arg("lossless") = kept.lossless(), py::arg("note") = kept.note,
                  py::arg("relative_error") = layer.relative_error);
}

py::dict to_dict(const ConvertReport& report) {
  py::list layers;
  for (const ConvertReport::Layer& layer : report.layers) layers.append(to_dict(layer));
  return py::dict(py::arg("layout") = report.layout, py::arg("layers") = layers,
                  py::arg("copied") = report.copied, py::arg("measured") = report.measured,
                  py::arg("lossless") = report.lossless(), py::arg("text") = report.text());
}

using Progress = std::function<void(std::int64_t, std::int64_t, const std::string&)>;

struct Arguments {
  std::string to;
  QuantizeOptions quantize = follow_source();
  std::optional<std::string> value_dtype;
  std::string layout;
  std::int64_t max_shard_bytes = 0;
  bool overwrite = false;
  bool lossless_only = false;
  std::optional<std::string> dense_dtype;
  std::vector<std::string> skip_modules;
};

ConvertOptions convert_options(const Arguments& a) {
  ConvertOptions options;
  options.to = a.to;
  options.quantize = a.quantize;
  if (a.value_dtype) options.value_dtype = parse_dtype(*a.value_dtype);
  options.save = {
      .layout = a.layout, .max_shard_bytes = a.max_shard_bytes, .overwrite = a.overwrite};
  options.lossless_only = a.lossless_only;
  if (a.dense_dtype) options.dense_dtype = parse_dtype(*a.dense_dtype);
  options.skip_modules = a.skip_modules;
  return options;
}

}  // namespace

void bind_convert(py::module_& m) {
  m.def("formats_markdown", &formats_markdown);
  using A = Arguments;
  py::class_<A>(m, "ConvertOptions")
      .def(py::init<>())
      .def_readwrite("to", &A::to)
      .def_readwrite("quantize", &A::quantize)
      .def_readwrite("value_dtype", &A::value_dtype)
      .def_readwrite("layout", &A::layout)
      .def_readwrite("max_shard_bytes", &A::max_shard_bytes)
      .def_readwrite("overwrite", &A::overwrite)
      .def_readwrite("lossless_only", &A::lossless_only)
      .def_readwrite("dense_dtype", &A::dense_dtype)
      .def_readwrite("skip_modules", &A::skip_modules);
  m.def(
      "plan_convert",
      [](const std::string& from, const A& arguments, const std::string& to_path) {
        ConvertReport report;
        {
          py::gil_scoped_release released;
          report = plan_convert(from, convert_options(arguments), to_path);
        }
        return to_dict(report);
      },
      py::arg("path"), py::arg("options"), py::arg("to_path") = "");
  m.def(
      "convert",
      [](const std::string& from, const std::string& to_path, const A& arguments,
         const std::optional<Progress>& progress) {
        ConvertOptions options = convert_options(arguments);
        if (progress) {
          options.progress = [&progress](std::int64_t done, std::int64_t total,
                                         const std::string& name) {
            const py::gil_scoped_acquire held;
            (*progress)(done, total, name);
          };
        }
        ConvertReport report;
        {
          py::gil_scoped_release released;
          report = convert(from, to_path, options);
        }
        return to_dict(report);
      },
      py::arg("path"), py::arg("to_path"), py::arg("options"), py::arg("progress") = py::none());
}

}  // namespace quantal::python

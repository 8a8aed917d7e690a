// Bindings of CheckpointReader: layer by layer, and rows of layers and of dense tensors.
#include <array>
#include <map>
#include <memory>
#include <utility>

#include "bindings/bindings.h"
#include "quantal/checkpoint.h"
#include "quantal/shards.h"

namespace quantal::python {
namespace {

using Spec = std::vector<std::int64_t>;

Spec to_ints(const PackedSpec& spec) {
  const auto ints = spec_to_ints(spec);
  return {ints.begin(), ints.end()};
}

std::shared_ptr<Buffer> buffer(std::vector<std::uint8_t>&& bytes) {
  return std::make_shared<Buffer>(Buffer{std::move(bytes)});
}

py::tuple to_python(PackedMatrix packed) {
  return py::make_tuple(to_ints(packed.spec), buffer(std::move(packed.codes)),
                        buffer(std::move(packed.stats)), buffer(std::move(packed.shared)));
}

py::tuple to_python(PackedRows rows) {
  return py::make_tuple(buffer(std::move(rows.codes)), buffer(std::move(rows.stats)),
                        buffer(std::move(rows.shared)));
}

std::unique_ptr<CheckpointReader> open(const std::string& path,
                                       const std::map<std::string, Spec>& weight_shapes) {
  LoadOptions options;
  options.weight_shape = [weight_shapes](const std::string& module) {
    const auto found = weight_shapes.find(module);
    return found == weight_shapes.end() ? Spec{} : found->second;
  };
  py::gil_scoped_release released;
  return CheckpointReader::open(path, options);
}

/// The exchange as a Python function that gets a writable memoryview.
Exchange exchange_of(const py::function& function) {
  return [&function](std::span<std::uint8_t> bytes) {
    const py::gil_scoped_acquire held;
    function(py::memoryview::from_memory(bytes.data(), static_cast<py::ssize_t>(bytes.size())));
  };
}

/// Quantizes rows [begin, end) of the dense tensor `name`.
py::tuple quantize_rows_of(const CheckpointReader& reader, const std::string& name,
                           const Spec& spec, std::int64_t begin, std::int64_t end,
                           const py::function& exchange) {
  const TensorView tensor = reader.describe_tensor(name);
  const PackedSpec whole = spec_from_ints(spec);
  if (tensor.shape.size() != 2 || tensor.shape[0] != whole.rows || tensor.shape[1] != whole.cols) {
    fail(Errc::kShape,
         "quantize_rows: tensor has shape " + shape_string(tensor.shape) + ", expected " +
             shape_string(std::array{whole.rows, whole.cols}),
         {.path = {}, .tensor = name});
  }
  const std::int64_t row_bytes = whole.cols * static_cast<std::int64_t>(dtype_size(tensor.dtype));
  const RowSource source{tensor.dtype, [&](RowRange rows, void* out) {
                           reader.read_rows(name, rows.begin, rows.end,
                                            {static_cast<std::uint8_t*>(out),
                                             static_cast<std::size_t>(rows.size() * row_bytes)});
                         }};
  PackedRows out;
  {
    py::gil_scoped_release released;
    out = quantize_rows(whole, {begin, end}, source, exchange_of(exchange));
  }
  return to_python(std::move(out));
}

/// (spec, codes, stats, shared) as bytes.
void add_layer(ModelDigest& digest, const std::string& name, const py::tuple& parts) {
  const BytesIn codes(parts[1].cast<py::buffer>()), stats(parts[2].cast<py::buffer>()),
      shared(parts[3].cast<py::buffer>());
  const PackedView view{spec_from_ints(parts[0].cast<Spec>()), codes.view(), stats.view(),
                        shared.view()};
  py::gil_scoped_release released;
  digest.add_layer(name, view);
}

/// (dtype name, shape, bytes).
void add_tensor(ModelDigest& digest, const std::string& name, const py::tuple& parts) {
  const BytesIn bytes(parts[2].cast<py::buffer>());
  const TensorView view{parse_dtype(parts[0].cast<std::string>()), parts[1].cast<Spec>(),
                        bytes.view()};
  py::gil_scoped_release released;
  digest.add_tensor(name, view);
}

using Range = std::pair<std::int64_t, std::int64_t>;

py::tuple read_rows_of(const CheckpointReader& reader, const std::string& name, Range rows,
                       Range stat_rows) {
  PackedRows part;
  {
    py::gil_scoped_release released;
    part = reader.read_layer_rows(name, {rows.first, rows.second},
                                  {stat_rows.first, stat_rows.second});
  }
  return to_python(std::move(part));
}

py::tuple read_layer_of(const CheckpointReader& reader, const std::string& name) {
  PackedMatrix packed;
  {
    py::gil_scoped_release released;
    packed = reader.read_layer(name);
  }
  return to_python(std::move(packed));
}

}  // namespace

void bind_reader(py::module_& m) {
  py::class_<ModelDigest>(m, "ModelDigest")
      .def(py::init<>())
      .def("add_layer", &add_layer, py::arg("name"), py::arg("layer"))
      .def("add_tensor", &add_tensor, py::arg("name"), py::arg("tensor"))
      .def("hex", &ModelDigest::hex);
  using R = CheckpointReader;
  py::class_<R>(m, "CheckpointReader")
      .def(py::init(&open), py::arg("path"),
           py::arg("weight_shapes") = std::map<std::string, Spec>{})
      .def_property_readonly("config_json", &R::config_json)
      .def_property_readonly("layout",
                             [](const R& r) {
                               py::gil_scoped_release released;
                               return r.layout();
                             })
      .def_property_readonly("layer_names", &R::layer_names)
      .def_property_readonly("tensor_names", &R::tensor_names)
      .def(
          "layer_spec",
          [](const R& r, const std::string& name) {
            py::gil_scoped_release released;
            return to_ints(r.layer_spec(name));
          },
          py::arg("name"))
      .def(
          "describe_tensor",
          [](const R& r, const std::string& name) {
            const TensorView view = r.describe_tensor(name);
            return py::make_tuple(std::string(dtype_name(view.dtype)), view.shape);
          },
          py::arg("name"), "(dtype name, shape)")
      .def("read_layer", &read_layer_of, py::arg("name"), "(spec, codes, stats, shared)")
      .def("read_layer_rows", &read_rows_of, py::arg("name"), py::arg("rows"), py::arg("stat_rows"),
           "(codes, stats, shared) of rows [begin, end) of codes and of statistics.")
      .def(
          "read_rows",
          [](const R& r, const std::string& name, std::int64_t begin, std::int64_t end,
             const py::buffer& out) {
            const BytesIn target(out);
            const std::span<std::uint8_t> bytes = target.writable();
            py::gil_scoped_release released;
            r.read_rows(name, begin, end, bytes);
          },
          py::arg("name"), py::arg("begin"), py::arg("end"), py::arg("out"))
      .def("quantize_rows", &quantize_rows_of, py::arg("name"), py::arg("spec"), py::arg("begin"),
           py::arg("end"), py::arg("exchange"),
           "(codes, stats, shared) of rows of a dense tensor; quantal/shards.h.");
}

}  // namespace quantal::python

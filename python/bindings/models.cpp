// Bindings of io.h and checkpoint.h: whole models in and out, without torch.
#include <algorithm>

#include "bindings/bindings.h"
#include "quantal/checkpoint.h"
#include "quantal/io.h"

namespace quantal::python {
namespace {

/// A tensor that lies in a mapped file; copied on request, never handed out.
struct MappedTensor {
  TensorView view;
  std::shared_ptr<void> owner;
};

void copy_into(const MappedTensor& tensor, const py::buffer& out) {
  const BytesIn target(out);
  const std::span<std::uint8_t> bytes = target.writable();
  check_size("python: bytes of the target", bytes.size(), tensor.view.bytes.size());
  py::gil_scoped_release released;
  std::copy(tensor.view.bytes.begin(), tensor.view.bytes.end(), bytes.begin());
}

void bind_source(py::module_& m) {
  py::class_<ModelSource>(m, "ModelSource")
      .def_static("open",
                  [](const std::string& path) {
                    py::gil_scoped_release released;
                    return ModelSource::open(path);
                  })
      .def_property_readonly("config_json", &ModelSource::config_json)
      .def_property_readonly("tokenizer_json", &ModelSource::tokenizer_json)
      .def_property_readonly(
          "tensors",
          [](const ModelSource& s) {
            py::list out;
            for (const ModelSource::Info& i : s.tensors()) {
              out.append(py::make_tuple(i.name, i.shape, i.stored_type, i.stored_bytes));
            }
            return out;
          })
      .def(
          "read",
          [](const ModelSource& s, const std::string& name, const std::string& dtype,
             const py::buffer& out) {
            const DType type = parse_dtype(dtype);
            const BytesIn target(out);
            const std::span<std::uint8_t> bytes = target.writable();
            for (const ModelSource::Info& i : s.tensors()) {
              if (i.name != name) continue;
              const std::int64_t numel = checked_numel(i.shape, name);
              const std::int64_t rows = i.shape.size() < 2 ? 1 : numel / i.shape.back();
              check_size("python: bytes of the target", bytes.size(),
                         static_cast<std::size_t>(numel) * dtype_size(type), {"", name, -1});
              py::gil_scoped_release released;
              s.read_rows(name, 0, rows, type, bytes.data(), serial_executor());
              return;
            }
            fail(Errc::kConfig, "python: the model has no tensor of this name", {"", name, -1});
          },
          py::arg("name"), py::arg("dtype"), py::arg("out"));
}

/// (CheckpointView over Python's buffers, and what keeps them alive).
struct HeldView {
  CheckpointView view;
  std::vector<BytesIn> held;
};

using Layers = std::vector<std::pair<std::string, py::tuple>>;

HeldView hold(const std::string& config_json, const std::string& quantization_config,
              const Layers& layers, const Layers& tensors) {
  HeldView out;
  out.view.config_json = config_json;
  out.view.quantization_config_json = quantization_config;
  const auto bytes = [&out](const py::handle& object) {
    out.held.emplace_back(object.cast<py::buffer>());
    return out.held.back().view();
  };
  for (const auto& [name, parts] : layers) {
    const auto ints = parts[0].cast<std::vector<std::int64_t>>();
    const auto codes = bytes(parts[1]), stats = bytes(parts[2]), shared = bytes(parts[3]);
    out.view.layers.emplace_back(name, PackedView{spec_from_ints(ints), codes, stats, shared});
  }
  for (const auto& [name, parts] : tensors) {
    const auto dtype = parse_dtype(parts[0].cast<std::string>());
    auto shape = parts[1].cast<std::vector<std::int64_t>>();
    out.view.tensors.emplace_back(name, TensorView{dtype, std::move(shape), bytes(parts[2])});
  }
  return out;
}

py::tuple load(const std::string& path) {
  auto checkpoint = std::make_shared<Checkpoint>();
  {
    py::gil_scoped_release released;
    *checkpoint = load_checkpoint(path);
  }
  py::dict layers, tensors;
  for (auto& [name, packed] : checkpoint->layers) {
    const auto ints = spec_to_ints(packed.spec);
    const auto buffer = [](std::vector<std::uint8_t>&& bytes) {
      return std::make_shared<Buffer>(Buffer{std::move(bytes)});
    };
    layers[py::str(name)] = py::make_tuple(
        std::vector<std::int64_t>(ints.begin(), ints.end()), buffer(std::move(packed.codes)),
        buffer(std::move(packed.stats)), buffer(std::move(packed.shared)));
  }
  for (const auto& [name, view] : checkpoint->tensors) {
    tensors[py::str(name)] = MappedTensor{view, checkpoint};
  }
  return py::make_tuple(checkpoint->config_json, layers, tensors);
}

void bind_checkpoint(py::module_& m) {
  m.def("load_checkpoint", &load, py::arg("path"));
  m.def(
      "save_checkpoint",
      [](const std::string& folder, const std::string& config_json,
         const std::string& quantization_config, const Layers& layers, const Layers& tensors,
         bool overwrite) {
        const HeldView held = hold(config_json, quantization_config, layers, tensors);
        py::gil_scoped_release released;
        save_checkpoint(folder, held.view, overwrite);
      },
      py::arg("folder"), py::arg("config_json"), py::arg("quantization_config"), py::arg("layers"),
      py::arg("tensors"), py::arg("overwrite") = false);
  m.def(
      "checkpoint_digest",
      [](const Layers& layers, const Layers& tensors) {
        const HeldView held = hold("{}", "", layers, tensors);
        py::gil_scoped_release released;
        return checkpoint_digest(held.view);
      },
      py::arg("layers"), py::arg("tensors"));
  m.def(
      "inspect_text",
      [](const std::string& path, bool all_tensors) {
        py::gil_scoped_release released;
        return inspect_text(path, all_tensors);
      },
      py::arg("path"), py::arg("all_tensors") = false);
  m.def(
      "inspect_json",
      [](const std::string& path) {
        py::gil_scoped_release released;
        return inspect_json(path);
      },
      py::arg("path"));
}

}  // namespace

void bind_models(py::module_& m) {
  py::class_<MappedTensor>(m, "MappedTensor")
      .def_property_readonly(
          "dtype", [](const MappedTensor& t) { return std::string(dtype_name(t.view.dtype)); })
      .def_property_readonly("shape", [](const MappedTensor& t) { return t.view.shape; })
      .def("copy_into", &copy_into, py::arg("out"));
  py::class_<SafetensorsFile, std::shared_ptr<SafetensorsFile>>(m, "SafetensorsFile")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def_property_readonly("metadata", &SafetensorsFile::metadata)
      .def("tensors", [](const std::shared_ptr<SafetensorsFile>& file) {
        py::dict out;
        for (const auto& [name, view] : file->tensors()) {
          out[py::str(name)] = MappedTensor{view, file};
        }
        return out;
      });
  bind_source(m);
  bind_checkpoint(m);
}

}  // namespace quantal::python

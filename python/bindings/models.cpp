// Bindings of io.h and checkpoint.h: whole models in and out, without torch.
#include <algorithm>
#include <map>

#include "bindings/bindings.h"
#include "quantal/checkpoint.h"
#include "quantal/io.h"
#include "quantal/model_fit.h"

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

HeldView hold(const std::string& config_json, const Layers& layers, const Layers& tensors) {
  HeldView out;
  out.view.config_json = config_json;
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

using Shapes = std::map<std::string, std::vector<std::int64_t>>;
using Specs = std::map<std::string, std::vector<std::int64_t>>;

/// Texts may hold any bytes.
py::dict to_python(const SideTexts& texts) {
  py::dict out;
  for (const auto& [name, text] : texts) out[py::str(name)] = py::bytes(text);
  return out;
}

py::list to_python(const std::vector<Substitution>& settings) {
  py::list out;
  for (const Substitution& s : settings) {
    out.append(py::dict(py::arg("what") = s.what, py::arg("asked") = s.asked,
                        py::arg("used") = s.used, py::arg("reason") = s.reason));
  }
  return out;
}

LoadOptions load_options(const Shapes& weight_shapes, bool verify_digest) {
  LoadOptions options;
  options.verify_digest = verify_digest;
  options.weight_shape = [weight_shapes](const std::string& module) {
    const auto found = weight_shapes.find(module);
    return found == weight_shapes.end() ? std::vector<std::int64_t>{} : found->second;
  };
  return options;
}

py::dict load(const std::string& path, const Shapes& weight_shapes, bool verify_digest) {
  auto checkpoint = std::make_shared<Checkpoint>();
  {
    py::gil_scoped_release released;
    *checkpoint = load_checkpoint(path, load_options(weight_shapes, verify_digest));
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
  return py::dict(py::arg("config_json") = checkpoint->config_json,
                  py::arg("layout") = checkpoint->layout, py::arg("notes") = checkpoint->notes,
                  py::arg("texts") = to_python(checkpoint->texts), py::arg("layers") = layers,
                  py::arg("tensors") = tensors);
}

void bind_fit(py::module_& m) {
  using R = LoadReport;
  py::class_<R>(m, "LoadReport")
      .def(py::init<>())
      .def_readwrite("layout", &R::layout)
      .def_readwrite("notes", &R::notes)
      .def_readonly("missing", &R::missing)
      .def_readonly("unexpected", &R::unexpected)
      .def_readonly("decoded", &R::decoded)
      .def_property_readonly("misshapen",
                             [](const R& r) {
                               py::list out;
                               for (const R::Misshapen& one : r.misshapen) {
                                 out.append(py::make_tuple(one.name, one.in_file, one.in_model));
                               }
                               return out;
                             })
      .def_property_readonly("settings", [](const R& r) { return to_python(r.settings); })
      .def_property_readonly("settings_text", &R::settings_text)
      .def("fits", &R::fits)
      .def("require_fit", &require_fit, py::arg("path"))
      .def("summary", &R::summary, py::arg("shown") = 32)
      .def("text", &R::text);
  m.def(
      "compare_model",
      [](const Specs& layers, const Shapes& tensors, const ModelParts& model,
         const std::optional<std::string>& config_json) {
        FileParts file{{}, tensors};
        for (const auto& [name, ints] : layers) file.layers[name] = spec_from_ints(ints);
        if (!config_json) return compare_model(file, model, nullptr);
        const QuantizationConfig config = config_from_json(*config_json);
        return compare_model(file, model, &config);
      },
      py::arg("layers"), py::arg("tensors"), py::arg("model"), py::arg("config_json"));
  using P = ModelParts;
  py::class_<P>(m, "ModelParts")
      .def(py::init<>())
      .def_readwrite("tensors", &P::tensors)
      .def_readwrite("linears", &P::linears)
      .def_readwrite("embeddings", &P::embeddings)
      .def_readwrite("tied", &P::tied);
}

std::vector<py::tuple> layouts(const std::string& dialect) {
  std::vector<py::tuple> out;
  const bool dense = dialect.empty() || dialect == "dense";
  for (const FileLayout& layout : file_layouts(dense ? nullptr : &dialect_by_name(dialect))) {
    out.push_back(py::make_tuple(std::string(layout.name), std::string(layout.title)));
  }
  return out;
}

void bind_checkpoint(py::module_& m) {
  m.def("load_checkpoint", &load, py::arg("path"), py::arg("weight_shapes") = Shapes{},
        py::arg("verify_digest") = false,
        "config_json, layout, notes, texts, layers {name: (spec, codes, stats, shared)}, tensors.");
  m.def(
      "read_tokenizer", [](const std::string& path) { return to_python(read_tokenizer(path)); },
      py::arg("path"));
  m.def(
      "read_config",
      [](const std::string& path) {
        py::gil_scoped_release released;
        return CheckpointReader::open(path)->config_json();
      },
      py::arg("path"), "Text of config.json of a folder or file; \"{}\" without one.");
  m.def("file_layouts", &layouts, py::arg("dialect"),
        "(name, title) of the layouts of a dialect, \"dense\" for none; the default first.");
  m.def(
      "save_checkpoint",
      [](const std::string& path, const std::string& config_json, const Layers& layers,
         const Layers& tensors, const std::vector<std::string>& dense, const SideTexts& texts,
         const std::string& layout, std::int64_t max_shard_bytes, bool overwrite) {
        HeldView held = hold(config_json, layers, tensors);
        held.view.dense = dense;
        held.view.texts = texts;
        py::gil_scoped_release released;
        save_checkpoint(
            path, held.view,
            {.layout = layout, .max_shard_bytes = max_shard_bytes, .overwrite = overwrite});
      },
      py::arg("path"), py::arg("config_json"), py::arg("layers"), py::arg("tensors"),
      py::arg("dense") = std::vector<std::string>{}, py::arg("texts") = SideTexts{},
      py::arg("layout") = "", py::arg("max_shard_bytes") = 0, py::arg("overwrite") = false);
  m.def(
      "checkpoint_digest",
      [](const Layers& layers, const Layers& tensors) {
        const HeldView held = hold("{}", layers, tensors);
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
  bind_fit(m);
  bind_checkpoint(m);
}

}  // namespace quantal::python

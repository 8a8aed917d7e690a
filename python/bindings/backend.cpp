// Bindings of backend.h: what a machine has and what a backend can do, as plain values.
#include "quantal/backend.h"

#include "bindings/bindings.h"

namespace quantal::python {
namespace {

std::string name_of(Backend backend) { return std::string(backend_name(backend)); }

std::optional<Backend> parse_optional(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return parse_backend(*name);
}

py::dict to_dict(const BackendCapabilities& can) {
  return py::dict(py::arg("quantization_bits") = can.quantization_bits,
                  py::arg("supports_distributed") = can.supports_distributed,
                  py::arg("supports_fsdp") = can.supports_fsdp,
                  py::arg("supports_bfloat16") = can.supports_bfloat16,
                  py::arg("supports_flash_attention") = can.supports_flash_attention,
                  py::arg("max_model_size") = can.max_model_size,
                  py::arg("distributed_backend") = can.distributed_backend,
                  py::arg("notes") = can.notes);
}

py::dict to_dict(const MemoryInfo& info) {
  return py::dict(py::arg("total") = info.total, py::arg("available") = info.available,
                  py::arg("allocated") = info.allocated);
}

py::list engines(const Machine& machine) {
  py::list out;
  for (const EngineStatus& status : engine_status(machine)) {
    py::dict by_backend;
    for (std::size_t i = 0; i < status.engines.size(); ++i) {
      by_backend[py::str(name_of(static_cast<Backend>(i)))] = status.engines[i];
    }
    out.append(py::dict(py::arg("dialect") = status.dialect, py::arg("title") = status.title,
                        py::arg("methods") = status.methods, py::arg("bits") = status.bits,
                        py::arg("engines") = by_backend));
  }
  return out;
}

void bind_machine(py::module_& m) {
  py::class_<Machine>(m, "Machine")
      .def(py::init<>())
      .def_readwrite("cuda_devices", &Machine::cuda_devices)
      .def_readwrite("cuda_compute", &Machine::cuda_compute)
      .def_readwrite("cuda_bf16", &Machine::cuda_bf16)
      .def_readwrite("cuda_name", &Machine::cuda_name)
      .def_readwrite("mps", &Machine::mps)
      .def_readwrite("mlx", &Machine::mlx)
      .def_readwrite("cpu_bf16", &Machine::cpu_bf16)
      .def_readwrite("collectives", &Machine::collectives);
  m.def("probe_machine", &probe_machine);
}

void bind_manager(py::module_& m) {
  py::class_<BackendManager>(m, "BackendManager")
      .def(py::init([](const std::optional<std::string>& backend, const Machine& machine) {
             return BackendManager(parse_optional(backend), machine);
           }),
           py::arg("backend"), py::arg("machine"))
      .def_static("from_env", &BackendManager::from_env)
      .def_property_readonly("backend",
                             [](const BackendManager& b) { return name_of(b.backend()); })
      .def_property_readonly("device", &BackendManager::device)
      .def_property_readonly("capabilities",
                             [](const BackendManager& b) { return to_dict(b.capabilities()); })
      .def("supports_quantization", &BackendManager::supports_quantization)
      .def("get_dtype",
           [](const BackendManager& b, bool prefer_bfloat16) {
             return std::string(dtype_name(b.get_dtype(prefer_bfloat16)));
           })
      .def("validate_model_size", &BackendManager::validate_model_size)
      .def("get_optimal_batch_size", &BackendManager::get_optimal_batch_size)
      .def("describe", &BackendManager::describe);
}

}  // namespace

void bind_backend(py::module_& m) {
  bind_machine(m);
  bind_manager(m);
  m.def("available_backends", [](const Machine& machine) {
    std::vector<std::string> out;
    for (const Backend backend : available_backends(machine)) out.push_back(name_of(backend));
    return out;
  });
  m.def("device_name",
        [](const std::string& backend) { return device_name(parse_backend(backend)); });
  m.def("documented_capabilities", [](const std::string& backend) {
    return to_dict(documented_capabilities(parse_backend(backend)));
  });
  m.def("host_memory", [] { return to_dict(host_memory()); });
  m.def("engine_status", &engines);
  m.def("engine_text", &engine_text);
}

}  // namespace quantal::python

// Bindings of quantal/plan.h: a path or an outline and plain options in, JSON and text out.
#include "quantal/plan.h"

#include <optional>
#include <tuple>

#include "bindings/bindings.h"

namespace quantal::python {
namespace {

struct Arguments {
  std::string backend = "cpu", mode = "inference", attention = "sdpa", optimizer = "adamw";
  std::string lora_dtype = "float32";
  std::optional<std::string> config_json, support, fallback;
  PlanOptions plain;
};

PlanOptions plan_options(const Arguments& a) {
  PlanOptions options = a.plain;
  options.backend = parse_backend(a.backend);
  options.mode = parse_plan_mode(a.mode);
  options.attention = parse_plan_attention(a.attention);
  options.optimizer = parse_plan_optimizer(a.optimizer);
  options.lora_dtype = parse_dtype(a.lora_dtype);
  if (a.config_json) options.config = config_from_json(*a.config_json);
  options.support = parse_support(a.support);
  options.fallback = parse_fallback(a.fallback);
  return options;
}

OutlineTensor::Kind parse_kind(const std::string& name) {
  using Kind = OutlineTensor::Kind;
  if (name == "linear") return Kind::kLinear;
  if (name == "dense") return Kind::kDense;
  if (name == "buffer") return Kind::kBuffer;
  return Kind::kPacked;
}

/// A tensor as Python's outline has it.
struct TensorArguments {
  std::string name, kind, dtype, tied_to;
  std::vector<std::int64_t> shape, spec;
  bool trainable = false, saved = true;
};

OutlineTensor to_outline(const TensorArguments& a) {
  OutlineTensor tensor;
  tensor.name = a.name;
  tensor.kind = parse_kind(a.kind);
  tensor.shape = a.shape;
  tensor.dtype = parse_dtype(a.dtype);
  tensor.tied_to = a.tied_to;
  tensor.trainable = a.trainable;
  tensor.saved = a.saved;
  if (tensor.kind == OutlineTensor::Kind::kPacked) {
    tensor.spec = spec_from_ints(a.spec);
    tensor.stored_bytes = layout_of(*tensor.spec).total_bytes(*tensor.spec) + kSpecBytes;
  }
  return tensor;
}

std::pair<std::string, std::string> answer(const Plan& plan) {
  return {plan.to_json(), plan.to_text()};
}

void bind_outline_tensor(py::module_& m) {
  using T = TensorArguments;
  py::class_<T>(m, "OutlineTensor")
      .def(py::init([](std::string name, std::string kind, std::vector<std::int64_t> shape,
                       std::string dtype, std::vector<std::int64_t> spec, std::string tied_to,
                       bool trainable, bool saved) {
             return T{std::move(name),  std::move(kind), std::move(dtype), std::move(tied_to),
                      std::move(shape), std::move(spec), trainable,        saved};
           }),
           py::arg("name"), py::arg("kind"), py::arg("shape"), py::arg("dtype"),
           py::arg("spec") = std::vector<std::int64_t>{}, py::arg("tied_to") = "",
           py::arg("trainable") = false, py::arg("saved") = true)
      .def_readonly("name", &T::name);
}

}  // namespace

void bind_plan(py::module_& m) {
  bind_outline_tensor(m);
  using A = Arguments;
  py::class_<A> options(m, "PlanOptions");
  options.def(py::init<>())
      .def_readwrite("backend", &A::backend)
      .def_readwrite("mode", &A::mode)
      .def_readwrite("attention", &A::attention)
      .def_readwrite("optimizer", &A::optimizer)
      .def_readwrite("lora_dtype", &A::lora_dtype)
      .def_readwrite("config_json", &A::config_json)
      .def_readwrite("support", &A::support)
      .def_readwrite("fallback", &A::fallback);
#define QUANTAL_PLAN_OPTION(python_name, member)              \
  options.def_property(                                       \
      python_name, [](const A& a) { return a.plain.member; }, \
      [](A& a, const decltype(PlanOptions::member)& value) { a.plain.member = value; })
  QUANTAL_PLAN_OPTION("memory_bytes", memory_bytes);
  QUANTAL_PLAN_OPTION("world_size", world_size);
  QUANTAL_PLAN_OPTION("batch_size", batch_size);
  QUANTAL_PLAN_OPTION("sequence_length", sequence_length);
  QUANTAL_PLAN_OPTION("lora_rank", lora_rank);
  QUANTAL_PLAN_OPTION("lora_targets", lora_targets);
  QUANTAL_PLAN_OPTION("lora_dropout", lora_dropout);
  QUANTAL_PLAN_OPTION("gradient_checkpointing", gradient_checkpointing);
  QUANTAL_PLAN_OPTION("loss_chunk", loss_chunk);
  QUANTAL_PLAN_OPTION("norms_in_float32", float32_norms);
  QUANTAL_PLAN_OPTION("cpu_offload", cpu_offload);
#undef QUANTAL_PLAN_OPTION
  m.def(
      "plan_path",
      [](const std::string& path, const A& a) {
        const PlanOptions options_in = plan_options(a);
        const py::gil_scoped_release released;
        return answer(plan(path, options_in));
      },
      py::arg("path"), py::arg("options"));
  m.def(
      "plan_outline",
      [](const std::string& source, const std::string& config_json,
         const std::vector<TensorArguments>& tensors, bool in_memory, const A& a) {
        const PlanOptions options_in = plan_options(a);
        ModelOutline model{.source = source, .config_json = config_json, .tensors = {}};
        model.in_memory = in_memory;
        for (const TensorArguments& tensor : tensors) model.tensors.push_back(to_outline(tensor));
        const py::gil_scoped_release released;
        return answer(plan(model, options_in));
      },
      py::arg("source"), py::arg("config_json"), py::arg("tensors"), py::arg("in_memory"),
      py::arg("options"));
}

}  // namespace quantal::python

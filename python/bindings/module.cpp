// The module quantal._core: error translation and the order of the parts.
#include <exception>

#include "bindings/bindings.h"

namespace quantal::python {
namespace {

/// Text that may quote bytes of a damaged file: what is not UTF-8 becomes U+FFFD.
py::str readable(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
}

/// Raises the Python class of an Error's kind, with its place as attributes.
void set_python_error(const Error& error) {
  const py::object make = py::module_::import("quantal._errors").attr("make_error");
  const ErrorSite& site = error.site();
  const py::object instance = make(std::string(errc_name(error.code())), readable(error.what()),
                                   readable(site.path), readable(site.tensor), site.offset);
  PyErr_SetObject(py::type::of(instance).ptr(), instance.ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    try {
      set_python_error(error);
    } catch (py::error_already_set& nested) {
      nested.restore();
    }
  }
}

}  // namespace
}  // namespace quantal::python

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  using quantal::python::Buffer;
  m.doc() = "Policy, formats and files of quantal, without torch.";
  m.attr("version") = QUANTAL_VERSION;
  py::register_exception_translator(&quantal::python::translate);
  py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer", py::buffer_protocol())
      .def_buffer([](Buffer& b) {
        return py::buffer_info(b.bytes.data(), 1, py::format_descriptor<std::uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(b.bytes.size())}, {1});
      })
      .def("__len__", [](const Buffer& b) { return b.bytes.size(); });
  quantal::python::bind_backend(m);
  quantal::python::bind_policy(m);
  quantal::python::bind_layers(m);
  quantal::python::bind_models(m);
  quantal::python::bind_convert(m);
  quantal::python::bind_plan(m);
  quantal::python::bind_reader(m);
}

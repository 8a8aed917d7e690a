// What the binding files share. Conversion only: nothing here decides or computes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "quantal/core.h"
#include "quantal/kernels.h"
#include "quantal/policy.h"

namespace quantal::python {

namespace py = pybind11;

/// Bytes that Python sees through the buffer protocol without a copy; it keeps them alive.
struct Buffer {
  std::vector<std::uint8_t> bytes;
};

/// A named tensor on its way to Python: dtype name, shape and bytes.
struct OwnedTensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::shared_ptr<Buffer> data;
};

inline OwnedTensor to_python(Tensor tensor) {
  return {std::string(dtype_name(tensor.dtype)), std::move(tensor.shape),
          std::make_shared<Buffer>(Buffer{std::move(tensor.bytes)})};
}

/// The bytes of a contiguous Python buffer of any element type. The view lives as long as `buffer`.
class BytesIn {
 public:
  explicit BytesIn(const py::buffer& buffer) : info_(buffer.request()) {
    py::ssize_t expected = info_.itemsize;
    for (std::size_t i = info_.shape.size(); i-- > 0;) {
      if (info_.shape[i] > 1 && info_.strides[i] != expected) {
        fail(Errc::kShape, "quantal: buffer is strided, expected contiguous");
      }
      expected *= info_.shape[i];
    }
  }
  std::span<const std::uint8_t> view() const {
    return {static_cast<const std::uint8_t*>(info_.ptr), size()};
  }
  std::span<std::uint8_t> writable() const {
    if (info_.readonly) fail(Errc::kShape, "quantal: buffer is read-only, expected writable");
    return {static_cast<std::uint8_t*>(info_.ptr), size()};
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(info_.size * info_.itemsize); }
  py::buffer_info info_;
};

/// "documented" or "extended"; throws Error{kConfig}.
std::optional<Support> parse_support(const std::optional<std::string>& text);
/// "none", "nearest" or "error"; throws Error{kConfig}.
std::optional<Fallback> parse_fallback(const std::optional<std::string>& text);

void bind_backend(py::module_& m);
void bind_policy(py::module_& m);
void bind_layers(py::module_& m);
void bind_models(py::module_& m);
void bind_convert(py::module_& m);
void bind_plan(py::module_& m);
void bind_reader(py::module_& m);

}  // namespace quantal::python

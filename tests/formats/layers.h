// What the tests of the dialects share: layers as named tensors, decoded matrices, options.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "quantal/formats.h"
#include "quantal/io.h"

namespace quantal::testing {

/// Tensors of one or more layers, to be looked up by import_layer.
class TensorMap {
 public:
  TensorMap() = default;
  explicit TensorMap(const std::vector<NamedTensor>& tensors) {
    for (const NamedTensor& t : tensors) set(t.name, t.tensor);
  }
  void set(const std::string& name, Tensor tensor) {
    tensors_[name] = std::move(tensor);
    views_[name] = tensors_[name].view();
  }
  void erase(const std::string& name) {
    tensors_.erase(name);
    views_.erase(name);
  }
  std::size_t size() const { return tensors_.size(); }
  Tensor& at(const std::string& name) { return tensors_.at(name); }
  TensorLookup lookup() {
    for (auto& [name, tensor] : tensors_) views_[name] = tensor.view();
    return [this](const std::string& name) -> const TensorView* {
      const auto it = views_.find(name);
      return it == views_.end() ? nullptr : &it->second;
    };
  }

 private:
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, TensorView> views_;
};

inline std::vector<std::uint8_t> bytes_of(const TensorView& view) {
  return {view.bytes.begin(), view.bytes.end()};
}

/// The tensor of a layer whose name ends with `suffix`.
inline const Tensor& tensor_named(const std::vector<NamedTensor>& tensors,
                                  const std::string& name) {
  for (const NamedTensor& t : tensors) {
    if (t.name == name) return t.tensor;
  }
  throw std::runtime_error("no tensor " + name);
}

/// All weights in row-major order, in the layer's own value type.
inline Tensor decode(const PackedMatrix& w, DType dtype) {
  Tensor out = make_tensor(dtype, {w.spec.rows, w.spec.cols});
  dequantize(w.view(), {0, w.spec.rows, 0, w.spec.cols}, dtype, out.bytes.data(), w.spec.cols,
             serial_executor());
  return out;
}

inline void expect_same_bytes(const PackedMatrix& a, const PackedMatrix& b,
                              const std::string& what) {
  EXPECT_EQ(a.spec, b.spec) << what;
  EXPECT_EQ(a.codes, b.codes) << what;
  EXPECT_EQ(a.stats, b.stats) << what;
  EXPECT_EQ(a.shared, b.shared) << what;
}

/// Runs `body`, which must throw Error{code} whose message contains every one of `parts`.
template <class Body>
void expect_error(Errc code, const std::vector<std::string>& parts, Body body) {
  try {
    body();
    ADD_FAILURE() << "no error, expected one with '" << (parts.empty() ? "" : parts[0]) << "'";
  } catch (const Error& e) {
    EXPECT_EQ(errc_name(e.code()), errc_name(code)) << e.what();
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
          << "message: " << e.what() << "\nexpected: " << part;
    }
  }
}

}  // namespace quantal::testing

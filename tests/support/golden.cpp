#include "support/golden.h"

#include <fstream>
#include <stdexcept>

namespace quantal::testing {

std::string golden_path(const std::string& relative) {
  return std::string(QUANTAL_GOLDEN_DIR) + "/" + relative;
}

GoldenBook::GoldenBook(const std::string& name)
    : file_(golden_path("vectors/" + name + ".safetensors")) {
  std::ifstream in(golden_path("vectors/" + name + ".json"));
  json_ = nlohmann::json::parse(in);
}

const TensorView& GoldenBook::tensor(const std::string& name) const {
  const TensorView* found = file_.find(name);
  if (found == nullptr) throw std::runtime_error("golden tensor is missing: " + name);
  return *found;
}

const TensorView& GoldenBook::field(const nlohmann::json& one_case,
                                    const std::string& field) const {
  return tensor(one_case.at("tensors").at(field).get<std::string>());
}

Tensor golden_input(const std::string& name, const std::string& dtype) {
  static const SafetensorsFile inputs(golden_path("vectors/inputs.safetensors"));
  const TensorView* found = inputs.find(name);
  if (found == nullptr) throw std::runtime_error("golden input is missing: " + name);
  Tensor out = make_tensor(parse_dtype(dtype), found->shape);
  narrow_from_f32(out.dtype, found->data<float>(), found->numel(), out.bytes.data());
  return out;
}

}  // namespace quantal::testing

// Access to the golden vectors of tests/golden (made by the real upstream packages).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quantal/core.h"
#include "quantal/io.h"

namespace quantal::testing {

/// Path of a file below tests/golden.
std::string golden_path(const std::string& relative);

/// One book: vectors/<name>.safetensors and vectors/<name>.json.
class GoldenBook {
 public:
  explicit GoldenBook(const std::string& name);
  /// `cases` of the JSON file: object or array of case objects.
  const nlohmann::json& cases() const { return json_.at("cases"); }
  const nlohmann::json& json() const { return json_; }
  /// Tensor by full name, e.g. "000.packed"; throws if absent.
  const TensorView& tensor(const std::string& name) const;
  /// The tensor that a case calls `field`.
  const TensorView& field(const nlohmann::json& one_case, const std::string& field) const;

 private:
  nlohmann::json json_;
  SafetensorsFile file_;
};

/// Shared input `name` of inputs.safetensors rounded (half to even) to `dtype`: "f32", "f16",
/// "bf16".
Tensor golden_input(const std::string& name, const std::string& dtype);

}  // namespace quantal::testing

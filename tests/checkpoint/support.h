// What the tests of this room share.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/sha256.h"
#include "io/temp_folder.h"
#include "quantal/checkpoint.h"
#include "support/golden.h"

namespace quantal::testing {

inline CheckpointView view_of(const Checkpoint& checkpoint) {
  CheckpointView view;
  view.config_json = checkpoint.config_json;
  for (const auto& [name, layer] : checkpoint.layers) view.layers.emplace_back(name, layer.view());
  for (const auto& [name, tensor] : checkpoint.tensors) view.tensors.emplace_back(name, tensor);
  return view;
}

/// Values of a layer's or tensor's weight in float32.
inline std::vector<float> values_of(const Checkpoint& checkpoint, const std::string& tensor) {
  std::vector<float> values;
  const std::string module = tensor.substr(0, tensor.rfind('.'));
  const auto layer = checkpoint.layers.find(module);
  if (layer != checkpoint.layers.end() && tensor.ends_with(".weight")) {
    const PackedSpec& spec = layer->second.spec;
    values.resize(static_cast<std::size_t>(spec.rows * spec.cols));
    dequantize(layer->second.view(), {0, spec.rows, 0, spec.cols}, DType::kF32, values.data(),
               spec.cols, serial_executor());
  } else {
    const TensorView& view = checkpoint.tensors.at(tensor);
    values.resize(static_cast<std::size_t>(view.numel()));
    widen_to_f32(view.dtype, view.bytes.data(), view.numel(), values.data());
  }
  return values;
}

inline std::string sha_of(const std::vector<float>& values) {
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * 4});
  return hash.hex();
}

/// vectors/checkpoint_expected.json: per checkpoint and tensor the SHA-256 of its float32 values.
inline const nlohmann::json& expected_values() {
  static const nlohmann::json kAll = [] {
    std::ifstream in(golden_path("vectors/checkpoint_expected.json"));
    return nlohmann::json::parse(in);
  }();
  return kAll;
}

/// Every golden checkpoint of a model: path below checkpoints/ and its key in expected_values().
struct GoldenModel {
  const char* path;
  const char* expected;
  const char* layout;  ///< what load_checkpoint must recognize
};
inline std::ostream& operator<<(std::ostream& out, const GoldenModel& model) {
  return out << model.path;
}
inline constexpr GoldenModel kGoldenModels[] = {
    {"dense-bf16", "dense-bf16", "dense transformers"},
    {"dense-bf16-sharded", "dense-bf16-sharded", "dense transformers"},
    {"dense-f16-bin", "dense-f16-bin", "dense torch"},
    {"bnb-nf4", "bnb-nf4", "bnb transformers"},
    {"bnb-nf4-double", "bnb-nf4-double", "bnb transformers"},
    {"bnb-fp4-f16", "bnb-fp4-f16", "bnb transformers"},
    {"bnb-nf4-storage-bf16", "bnb-nf4-storage-bf16", "bnb transformers"},
    {"bnb-int8", "bnb-int8", "bnb transformers"},
    {"hqq-pt-4bit", "hqq-pt-4bit", "hqq qmodel"},
    {"hqq-pt-3bit-axis0", "hqq-pt-3bit-axis0", "hqq qmodel"},
    {"hqq-pt-2bit", "hqq-pt-2bit", "hqq qmodel"},
    {"hqq-safetensors", "hqq-safetensors", "hqq hqq"},
    {"hqq-transformers", "hqq-transformers", "hqq transformers"},
    {"quanto-int2", "quanto-int2", "quanto quanto"},
    {"quanto-int4", "quanto-int4", "quanto quanto"},
    {"quanto-int8", "quanto-int8", "quanto quanto"},
    {"quanto-float8", "quanto-float8", "quanto quanto"},
    {"mlx-4bit", "mlx-4bit", "mlx mlx-lm"},
    {"mlx-mixed", "mlx-mixed", "mlx mlx-lm"},
    {"mlx-mxfp4", "mlx-mxfp4", "mlx mlx-lm"},
    {"mlx-npz", "mlx-npz", "mlx npz"},
    {"layout-bnb-dir", "bnb-nf4", "bnb guide"},
    {"layout-bnb-single/model.pth", "bnb-int8", "bnb single"},
    {"layout-hqq-dir", "layout-hqq-dir", "hqq guide"},
    {"layout-mlx-dir", "layout-mlx-dir", "mlx guide"},
    {"layout-quanto-dir", "layout-quanto-dir", "quanto guide"},
    {"layout-quanto-single/quanto_model.pth", "layout-quanto-dir", "quanto single"},
    {"gguf/tiny-f16.gguf", "gguf/tiny-f16.gguf", "dense gguf"},
    {"gguf/tiny-q4_0.gguf", "gguf/tiny-q4_0.gguf", "gguf gguf"},
    {"gguf/tiny-q4_1.gguf", "gguf/tiny-q4_1.gguf", "gguf gguf"},
    {"gguf/tiny-q5_0.gguf", "gguf/tiny-q5_0.gguf", "gguf gguf"},
    {"gguf/tiny-q5_1.gguf", "gguf/tiny-q5_1.gguf", "gguf gguf"},
    {"gguf/tiny-q8_0.gguf", "gguf/tiny-q8_0.gguf", "gguf gguf"},
};

/// Code of the Error that `body` throws; the test fails if it throws none.
inline Error error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return e;
  }
  ADD_FAILURE() << "no Error was thrown";
  return Error(Errc::kInternal, "no Error was thrown");
}

inline std::string what_of(const std::function<void()>& body) { return error_of(body).what(); }

}  // namespace quantal::testing

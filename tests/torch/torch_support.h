// Helpers of the torch tests.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <string>

#include "quantal/torch.h"
#include "support/golden.h"

namespace quantal::testing {

/// Asserts that `statement` throws quantal::Error of `kind` whose message contains `text`.
template <class Function>
void expect_error(Errc kind, const std::string& text, Function&& statement) {
  try {
    statement();
    FAIL() << "no error, expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), kind) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

inline QuantizeOptions hqq_options(int bits, std::int64_t group_size, int axis = 1) {
  QuantizeOptions options;
  options.method = QuantizationMethod::HQQ;
  options.bits = bits;
  options.group_size = group_size;
  options.axis = axis;
  return options;
}

inline QuantizeOptions nf4_options(std::int64_t group_size, bool double_quant) {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_NF4;
  options.group_size = group_size;
  options.double_quant = double_quant;
  return options;
}

/// |a - b| / |b| in the Frobenius norm, in double.
inline double relative(const torch::Tensor& a, const torch::Tensor& b) {
  const auto x = a.to(torch::kDouble), y = b.to(torch::kDouble);
  return (x - y).norm().item<double>() / std::max(y.norm().item<double>(), 1e-300);
}

/// A folder of its own below the system's temporary one, removed at the end.
class TempFolder {
 public:
  explicit TempFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() /
              ("quantal_" + name + "_" + std::to_string(::getpid()))) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

/// A copy of a golden tensor.
inline torch::Tensor golden_tensor(const std::string& file, const std::string& name) {
  const SafetensorsFile book(golden_path(file));
  const TensorView* view = book.find(name);
  if (view == nullptr) throw std::runtime_error("no golden tensor " + name);
  auto* data = const_cast<std::uint8_t*>(view->bytes.data());
  return torch::from_blob(data, view->shape, torch::TensorOptions().dtype(to_torch(view->dtype)))
      .clone();
}

/// The token ids of the golden logits, [1, 12].
inline torch::Tensor golden_ids() {
  return torch::tensor({1, 5, 200, 37, 99, 255, 0, 64, 128, 3, 77, 11}, torch::kLong).unsqueeze(0);
}

/// A Llama small enough for a unit test, with values from `seed`.
inline Llama tiny_llama(std::uint64_t seed = 1, bool tied = true) {
  LlamaConfig config;
  config.vocab_size = 96;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.tie_word_embeddings = tied;
  Llama model(config);
  model->initialize(seed);
  return model;
}

inline QuantizationConfig hqq_config(int bits = 4, std::int64_t group_size = 64) {
  QuantizationConfig config;
  config.method = QuantizationMethod::HQQ;
  config.bits = bits;
  config.bits_set = true;
  config.group_size = group_size;
  config.compute_dtype = DType::kF32;
  return config;
}

}  // namespace quantal::testing

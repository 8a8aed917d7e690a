#include <gtest/gtest.h>

#include <algorithm>

#include "quantal/policy.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

QuantizationConfig make(M method, int bits) {
  QuantizationConfig config;
  config.method = method;
  config.bits = bits;
  config.bits_set = true;
  return config;
}

const Issue* find(const std::vector<Issue>& issues, const std::string& id) {
  const auto found = std::find_if(issues.begin(), issues.end(),
                                  [&id](const Issue& issue) { return issue.id == id; });
  return found == issues.end() ? nullptr : &*found;
}

/// The issue with this id for this pair; fails the test if absent.
Issue expect_issue(const QuantizationConfig& config, Backend backend, const std::string& id) {
  const auto issues = validate_quantization_config(config, backend);
  const Issue* issue = find(issues, id);
  if (issue == nullptr) {
    ADD_FAILURE() << "no issue " << id;
    return {};
  }
  EXPECT_FALSE(issue->message.empty());
  EXPECT_FALSE(issue->remedy.empty());
  return *issue;
}

void expect_no_issue(const QuantizationConfig& config, Backend backend, const std::string& id) {
  EXPECT_EQ(find(validate_quantization_config(config, backend), id), nullptr) << id;
}

TEST(Validate, GoodPairsHaveNoIssues) {
  EXPECT_TRUE(validate_quantization_config(make(M::HQQ, 8), Backend::CPU).empty());
  EXPECT_TRUE(validate_quantization_config(make(M::HQQ, 4), Backend::CUDA).empty());
  EXPECT_TRUE(validate_quantization_config(QuantizationConfig{}, Backend::CUDA).empty());
  EXPECT_TRUE(validate_quantization_config(make(M::NONE, 4), Backend::MPS).empty());
}

TEST(Validate, MatrixTexts) {
  EXPECT_EQ(expect_issue(make(M::BNB_NF4, 4), Backend::CPU, "backend.bnb").message,
            "bitsandbytes quantization is only supported on CUDA, not cpu");
  EXPECT_EQ(expect_issue(make(M::MLX_INT4, 4), Backend::CUDA, "backend.mlx").message,
            "MLX quantization is only supported on Apple Silicon, not cuda");
  EXPECT_EQ(expect_issue(make(M::QUANTO_INT8, 8), Backend::MLX, "backend.quanto").message,
            "Quanto quantization is not supported on mlx");
  expect_no_issue(make(M::BNB_NF4, 4), Backend::CUDA, "backend.bnb");
  expect_no_issue(make(M::MLX_INT4, 4), Backend::MPS, "backend.mlx");
}

TEST(Validate, ExtendedSupportLiftsTheMatrix) {
  QuantizationConfig config = make(M::BNB_NF4, 4);
  config.backend_options["support"] = "extended";
  EXPECT_TRUE(validate_quantization_config(config, Backend::CPU).empty());
}

TEST(Validate, MpsRules) {
  EXPECT_EQ(expect_issue(make(M::HQQ, 4), Backend::MPS, "mps.bits").message,
            "MPS backend has limited 4-bit quantization support");
  expect_no_issue(make(M::HQQ, 8), Backend::MPS, "mps.bits");
  expect_no_issue(make(M::MLX_INT4, 4), Backend::MPS, "mps.bits");
  expect_no_issue(make(M::QUANTO_INT4, 4), Backend::MPS, "mps.bits");
  QuantizationConfig eight;  // the default of 4 bits is not what BNB_INT8 means
  eight.method = M::BNB_INT8;
  expect_no_issue(eight, Backend::MPS, "mps.bits");

  QuantizationConfig bf16 = make(M::MLX_INT4, 4);
  bf16.compute_dtype = DType::kBF16;
  EXPECT_EQ(expect_issue(bf16, Backend::MPS, "mps.bfloat16").message,
            "MPS backend doesn't support bfloat16");
  expect_no_issue(bf16, Backend::MLX, "mps.bfloat16");
  bf16.compute_dtype = DType::kF16;
  expect_no_issue(bf16, Backend::MPS, "mps.bfloat16");
}

TEST(Validate, BitsInConflictWithTheMethod) {
  const Issue issue = expect_issue(make(M::BNB_NF4, 8), Backend::CUDA, "method.bits");
  EXPECT_EQ(issue.severity, "error");
  EXPECT_EQ(issue.message, "method bnb_nf4 has 4 bits, not 8");
  QuantizationConfig unset;
  unset.method = M::BNB_INT8;
  expect_no_issue(unset, Backend::CUDA, "method.bits");
}

TEST(Validate, WidthsThatDoNotExist) {
  expect_no_issue(make(M::HQQ, 3), Backend::CPU, "method.width");
  EXPECT_NE(expect_issue(make(M::HQQ, 16), Backend::CPU, "method.width").message.find("not exist"),
            std::string::npos);
  for (const MethodInfo& method : methods()) {
    expect_no_issue(make(method.method, method.bits == 0 ? 4 : method.bits), Backend::CUDA,
                    "method.not_built");
  }
}

TEST(Validate, SettingsOfTheDialect) {
  QuantizationConfig bnb = make(M::BNB_NF4, 4);
  bnb.group_size = 48;
  EXPECT_NE(expect_issue(bnb, Backend::CUDA, "group_size.illegal").message.find("48"),
            std::string::npos);
  bnb.block_size = 128;  // takes the place of group_size
  expect_no_issue(bnb, Backend::CUDA, "group_size.illegal");
  bnb.quant_type = "nf5";
  EXPECT_NE(expect_issue(bnb, Backend::CUDA, "quant_type.unknown").message.find("'nf5'"),
            std::string::npos);
  QuantizationConfig hqq = make(M::HQQ, 4);
  hqq.group_size = 12;
  expect_issue(hqq, Backend::CPU, "group_size.illegal");
  hqq.group_size = 0;
  expect_no_issue(hqq, Backend::CPU, "group_size.illegal");
  hqq.quant_scale = true;
  expect_no_issue(hqq, Backend::CPU, "hqq.quant_meta");
  bnb.quant_scale = true;
  expect_issue(bnb, Backend::CUDA, "hqq.quant_meta");
  hqq.compute_dtype = DType::kI32;
  expect_issue(hqq, Backend::CPU, "compute_dtype.kind");
}

TEST(Validate, BackendOptions) {
  QuantizationConfig config = make(M::HQQ, 8);
  config.backend_options["axis"] = "2";
  EXPECT_NE(expect_issue(config, Backend::CPU, "options.value").message.find("axis is '2'"),
            std::string::npos);
  config.backend_options = {{"suport", "extended"}};
  EXPECT_NE(expect_issue(config, Backend::CPU, "options.unknown").remedy.find("'support'"),
            std::string::npos);
}

TEST(Validate, Layers) {
  QuantizationConfig config = make(M::HQQ, 4);
  LayerOverride two_bits, bnb;
  two_bits.bits = 7;
  bnb.method = M::BNB_NF4;
  config.layer_configs = {{"a", two_bits}, {"b", bnb}, {"re:(", {}}};
  EXPECT_NE(expect_issue(config, Backend::CPU, "layer.width").message.find("'a'"),
            std::string::npos);
  EXPECT_NE(expect_issue(config, Backend::CPU, "backend.bnb").message.find("'b'"),
            std::string::npos);
  expect_issue(config, Backend::CPU, "layer.pattern");
}

TEST(Matrix, MarkdownIsThatOfTheDocumentation) {
  EXPECT_EQ(
      compatibility_matrix_markdown(),
      R"(| Backend | BNB_NF4 | BNB_INT8 | HQQ | MLX_INT4 | MLX_INT8 | QUANTO_INT2 | QUANTO_INT4 | QUANTO_INT8 |
|---------|---------|----------|-----|----------|----------|-------------|-------------|-------------|
| CUDA    | ✓       | ✓        | ✓   | ✗        | ✗        | ✓           | ✓           | ✓           |
| MPS     | ✗       | ✗        | ✓   | ✓        | ✓        | ✓           | ✓           | ✓           |
| MLX     | ✗       | ✗        | ✓   | ✓        | ✓        | ✗           | ✗           | ✗           |
| CPU     | ✗       | ✗        | ✓   | ✗        | ✗        | ✓           | ✓           | ✓           |
)");
}

}  // namespace
}  // namespace quantal

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

TEST(Validate, CudaDeviceWithoutBfloat16) {
  QuantizationConfig config = make(M::BNB_NF4, 4);
  config.compute_dtype = DType::kBF16;
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());
  ValidationFacts old_device;
  old_device.cuda_has_bf16 = false;
  EXPECT_NE(find(validate_quantization_config(config, Backend::CUDA, old_device), "cuda.bfloat16"),
            nullptr);
  config.compute_dtype = DType::kF16;
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA, old_device).empty());
}

TEST(Validate, StorageDtype) {
  QuantizationConfig config = make(M::BNB_NF4, 4);
  config.compute_dtype = DType::kBF16;
  for (const DType good : {DType::kU8, DType::kBF16}) {
    config.storage_dtype = good;
    EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());
  }
  config.storage_dtype = DType::kF32;
  const Issue fsdp = expect_issue(config, Backend::CUDA, "storage_dtype.fsdp");
  EXPECT_EQ(fsdp.severity, "warning");
  EXPECT_NE(fsdp.remedy.find("bfloat16"), std::string::npos);
  config.storage_dtype = DType::kI64;
  EXPECT_EQ(expect_issue(config, Backend::CUDA, "storage_dtype.kind").severity, "error");
  config.compute_dtype.reset();  // CUDA computes in bf16 where it can
  config.storage_dtype = DType::kBF16;
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());
}

TEST(Validate, SettingsWithoutEffectOnlyWhereTheyWereGiven) {
  EXPECT_TRUE(validate_quantization_config(make(M::HQQ, 4), Backend::CUDA).empty())
      << "the default of double_quant is no finding";
  QuantizationConfig config = make(M::HQQ, 4);
  config.double_quant_set = true;
  expect_issue(config, Backend::CUDA, "double_quant.no_effect");
  config.double_quant = false;
  expect_no_issue(config, Backend::CUDA, "double_quant.no_effect");
  config.quant_type = "fp4";
  expect_issue(config, Backend::CUDA, "quant_type.no_effect");
  config.block_size = 64;
  expect_issue(config, Backend::CUDA, "block_size.no_effect");
  config.method = M::NONE;
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());

  config = make(M::BNB_NF4, 4);
  config.double_quant_set = true;
  config.quant_type = "fp4";
  config.block_size = 128;
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());
}

// ------------------------------------------------------------------ with a model

std::vector<Issue> with_layers(const QuantizationConfig& config, std::vector<LayerShape> layers,
                               Backend backend = Backend::CPU) {
  ValidationFacts facts;
  facts.layers = std::move(layers);
  return validate_quantization_config(config, backend, facts);
}

TEST(ValidateModel, GroupSizesAgainstShapes) {
  const QuantizationConfig config = make(M::MLX_INT4, 4);
  const std::vector<LayerShape> layers = {{"a.good", 64, 128}, {"a.odd", 64, 96}};
  const auto issues = with_layers(config, layers, Backend::MPS);
  const Issue* issue = find(issues, "group_size.shape");
  ASSERT_NE(issue, nullptr);
  EXPECT_EQ(issue->severity, "warning");
  EXPECT_NE(issue->message.find("1 of 2"), std::string::npos) << issue->message;
  EXPECT_NE(issue->message.find("'a.odd' [64, 96]"), std::string::npos) << issue->message;
  EXPECT_EQ(issue->message.find("a.good"), std::string::npos) << issue->message;
  EXPECT_NE(issue->remedy.find("group_size 32"), std::string::npos) << issue->remedy;

  QuantizationConfig smaller = config;
  smaller.group_size = 32;
  EXPECT_TRUE(with_layers(smaller, layers, Backend::MPS).empty());
  QuantizationConfig skipping = config;
  skipping.skip_modules = {"odd"};
  EXPECT_TRUE(with_layers(skipping, layers, Backend::MPS).empty());
}

TEST(ValidateModel, ManyBadLayersAreOneFinding) {
  std::vector<LayerShape> layers;
  for (int i = 0; i < 100; ++i) layers.push_back({"l." + std::to_string(i), 64, 33});
  const auto issues = with_layers(make(M::MLX_INT8, 8), layers, Backend::MLX);
  const Issue* issue = find(issues, "group_size.shape");
  ASSERT_NE(issue, nullptr);
  EXPECT_NE(issue->message.find("100 of 100"), std::string::npos);
  EXPECT_LT(issue->message.size(), 300u);
}

TEST(ValidateModel, Patterns) {
  QuantizationConfig config = make(M::HQQ, 4);
  config.skip_modules = {"lm_hed"};
  config.layer_configs = {{"layers.2", {}}, {"layers.7", {}}};
  const std::vector<LayerShape> layers = {{"layers.2.q_proj", 64, 64}, {"lm_head", 64, 64}};
  const auto issues = with_layers(config, layers);
  ASSERT_EQ(issues.size(), 2u);
  EXPECT_EQ(issues[0].id, "pattern.unmatched");
  EXPECT_NE(issues[0].message.find("lm_hed"), std::string::npos);
  EXPECT_NE(issues[1].message.find("layers.7"), std::string::npos);
  EXPECT_TRUE(with_layers(config, {{"", 64, 64}}).empty()) << "shapes alone have no names";
}

TEST(ValidateModel, NothingToQuantize) {
  QuantizationConfig config = make(M::HQQ, 4);
  EXPECT_NE(find(with_layers(config, {}), "model.no_linear"), nullptr);
  config.skip_modules = {"*"};
  EXPECT_NE(find(with_layers(config, {{"a", 64, 64}}), "model.nothing"), nullptr);
  EXPECT_TRUE(with_layers(make(M::NONE, 4), {{"a", 64, 64}}).empty());
}

TEST(ValidateModel, AbsurdShapesAreFindingsNotExceptions) {
  for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{0, 0},
                                   {-1, 64},
                                   {64, -64},
                                   {INT64_MAX, INT64_MAX},
                                   {INT64_MAX, 64}}) {
    for (const MethodInfo& method : methods()) {
      if (method.method == M::NONE) continue;
      QuantizationConfig config = make(method.method, method.bits == 0 ? 4 : method.bits);
      config.backend_options["support"] = "extended";
      EXPECT_FALSE(with_layers(config, {{"a", rows, cols}}).empty())
          << method.name << " " << rows << " " << cols;
    }
  }
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

TEST(Validate, Int8Activations) {
  QuantizationConfig config = make(M::HQQ, 4);
  config.backend_options["activations"] = "int8";
  EXPECT_TRUE(validate_quantization_config(config, Backend::CPU).empty());
  config.backend_options["activations"] = "int4";
  EXPECT_NE(expect_issue(config, Backend::CPU, "options.value")
                .message.find("activations is 'int4', expected one of"),
            std::string::npos);
  config.backend_options = {{"activations", "int8"}, {"axis", "0"}};
  EXPECT_NE(expect_issue(config, Backend::CPU, "activations.no_effect")
                .message.find("no effect on hqq: statistics are shared by rows"),
            std::string::npos);
  config.backend_options.erase("axis");
  config.group_size = 64;
  EXPECT_TRUE(with_layers(config, {{"a", 64, 128}}).empty());
  config.group_size = 24;
  const auto issues = with_layers(config, {{"a", 64, 96}});
  const bool named = std::any_of(issues.begin(), issues.end(), [](const Issue& issue) {
    return issue.id == "activations.exact" && issue.message.find("'a'") != std::string::npos;
  });
  EXPECT_TRUE(named);
  config = make(M::BNB_INT8, 8);
  config.backend_options = {{"activations", "int8"}, {"int8_threshold", "6"}};
  EXPECT_NE(expect_issue(config, Backend::CUDA, "options.value").message.find("int8_threshold"),
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

  LayerOverride eight, group, nested;
  eight.bits = 8;
  group.group_size = 12;
  nested.double_quant = true;
  config = make(M::BNB_NF4, 4);
  config.layer_configs = {{"a", eight}};  // the sibling bnb_int8
  EXPECT_TRUE(validate_quantization_config(config, Backend::CUDA).empty());
  eight.bits = 2;
  config.layer_configs = {{"a", eight}};
  expect_issue(config, Backend::CUDA, "layer.width");
  config = make(M::MLX_INT4, 4);
  config.layer_configs = {{"a", eight}};
  EXPECT_NE(expect_issue(config, Backend::MPS, "layer.width").message.find("no 2-bit form"),
            std::string::npos);
  config = make(M::HQQ, 4);
  config.layer_configs = {{"a", group}};
  EXPECT_NE(expect_issue(config, Backend::CPU, "layer.settings").message.find("12"),
            std::string::npos);
  config.layer_configs = {{"a", nested}};
  expect_issue(config, Backend::CPU, "layer.no_effect");
  expect_no_issue(config, Backend::CPU, "double_quant.no_effect");
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

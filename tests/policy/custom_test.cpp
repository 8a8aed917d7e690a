// Methods of one's own: registered by name, without rules of a dialect.
#include <gtest/gtest.h>

#include <algorithm>

#include "quantal/policy.h"

namespace quantal {
namespace {

std::string refusal_of(const std::string& name) {
  try {
    register_custom_method(name);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kConfig);
    return error.what();
  }
  return "";
}

TEST(CustomMethod, NamesAreIdentifiersAndNotBuiltIn) {
  for (const char* bad : {"", "Upper", "with space", "9lives", "dash-ed"}) {
    EXPECT_NE(refusal_of(bad).find("lower-case letters"), std::string::npos) << bad;
  }
  EXPECT_NE(refusal_of(std::string(65, 'a')), "");
  EXPECT_NE(refusal_of("hqq").find("built-in"), std::string::npos);
  EXPECT_NE(refusal_of("none"), "");
  EXPECT_FALSE(is_custom_method("hqq"));
}

TEST(CustomMethod, ConfigsNameItOnceItIsRegistered) {
  const std::string json = R"({"method": "custom_test_a", "bits": 3})";
  EXPECT_THROW(config_from_json(json), Error);
  register_custom_method("custom_test_a");
  register_custom_method("custom_test_a");
  const auto names = custom_methods();
  EXPECT_EQ(std::count(names.begin(), names.end(), "custom_test_a"), 1);
  const QuantizationConfig config = config_from_json(json);
  EXPECT_EQ(config.custom_method, "custom_test_a");
  EXPECT_EQ(config.method, QuantizationMethod::NONE);
  EXPECT_EQ(config.bits, 3);
  EXPECT_EQ(config_from_json(config_to_json(config)).custom_method, "custom_test_a");
  EXPECT_THROW(config_from_json(R"({"method": "custom_test_a", "bits": 17})"), Error);
}

TEST(CustomMethod, FactoryNamesItAsTheAdapterOnEveryBackend) {
  register_custom_method("custom_test_b");
  QuantizationConfig config;
  config.custom_method = "custom_test_b";
  config.method = QuantizationMethod::NONE;
  config.layer_configs.push_back({"first", {.bits = 8}});
  config.layer_configs.push_back({"second", {.bits = 16}});
  config.layer_configs.push_back({"third", {.method = QuantizationMethod::HQQ}});
  for (const Backend backend : {Backend::CUDA, Backend::MPS, Backend::MLX, Backend::CPU}) {
    const Decision decision = decide_adapter(backend, config);
    EXPECT_EQ(decision.adapter, "custom_test_b");
    EXPECT_TRUE(decision.substitutions.empty());
    EXPECT_EQ(decision.config.storage_dtype, DType::kU8);
    LayerRules rules(decision.config);
    const auto plain = rules.choose("other", 7, 5);
    EXPECT_TRUE(plain.quantize);
    EXPECT_EQ(plain.options.method, QuantizationMethod::NONE);
    EXPECT_EQ(rules.choose("first", 7, 5).options.bits, 8);
    EXPECT_FALSE(rules.choose("second", 64, 64).quantize);
    EXPECT_EQ(rules.choose("third", 64, 64).options.method, QuantizationMethod::HQQ);
    EXPECT_FALSE(rules.choose("lm_head", 64, 64).quantize);
  }
}

TEST(CustomMethod, ValidationKeepsTheRulesThatStillMeanSomething) {
  register_custom_method("custom_test_c");
  QuantizationConfig config;
  config.custom_method = "custom_test_c";
  config.method = QuantizationMethod::NONE;
  config.backend_options["speed"] = "11";
  EXPECT_TRUE(validate_quantization_config(config, Backend::MLX).empty());
  config.skip_modules = {"absent"};
  config.compute_dtype = DType::kI8;
  ValidationFacts facts;
  facts.layers = {{"layer", 8, 8}};
  std::vector<std::string> ids;
  for (const Issue& issue : validate_quantization_config(config, Backend::CPU, facts)) {
    ids.push_back(issue.id);
  }
  EXPECT_EQ(ids, std::vector<std::string>{"compute_dtype.kind"});
  config.compute_dtype.reset();
  const auto issues = validate_quantization_config(config, Backend::CPU, facts);
  ASSERT_EQ(issues.size(), 1u);
  EXPECT_EQ(issues[0].id, "pattern.unmatched");
}

}  // namespace
}  // namespace quantal

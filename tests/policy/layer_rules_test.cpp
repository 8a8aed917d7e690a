#include <gtest/gtest.h>

#include "quantal/policy.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

QuantizationConfig hqq(int bits = 4) {
  QuantizationConfig config;
  config.method = M::HQQ;
  config.bits = bits;
  config.bits_set = true;
  config.compute_dtype = DType::kF32;
  return config;
}

LayerOverride with_bits(int bits) {
  LayerOverride layer;
  layer.bits = bits;
  return layer;
}

TEST(LayerRules, DefaultsBecomeOptions) {
  QuantizationConfig config = hqq(8);
  config.group_size = 128;
  config.compute_dtype = DType::kBF16;
  config.backend_options = {{"axis", "0"}, {"optimize", "False"}};
  LayerRules rules(config);
  const auto choice = rules.choose("model.layers.0.q_proj", 256, 256);
  EXPECT_TRUE(choice.quantize) << choice.reason;
  EXPECT_EQ(choice.options.method, M::HQQ);
  EXPECT_EQ(choice.options.bits, 8);
  EXPECT_EQ(choice.options.group_size, 128);
  EXPECT_EQ(choice.options.axis, 0);
  EXPECT_FALSE(choice.options.optimize);
  EXPECT_EQ(choice.options.value_dtype, DType::kBF16);
  EXPECT_EQ(choice.compute_dtype, DType::kBF16);
}

TEST(LayerRules, BitsandbytesUsesBlockSizeIfSet) {
  QuantizationConfig config;
  config.group_size = 128;
  config.quant_type = "fp4";
  config.double_quant = false;
  LayerRules rules(config);
  auto choice = rules.choose("a", 64, 64);
  EXPECT_EQ(choice.options.group_size, 128);
  EXPECT_EQ(choice.options.quant_type, "fp4");
  EXPECT_FALSE(choice.options.double_quant);
  EXPECT_EQ(describe_options(choice.options), "bnb_nf4 4-bit g128 fp4");
  config.block_size = 256;
  EXPECT_EQ(LayerRules(config).choose("a", 64, 64).options.group_size, 256);
}

TEST(LayerRules, SkipModules) {
  LayerRules rules(hqq());
  const auto head = rules.choose("model.lm_head", 64, 64);
  EXPECT_FALSE(head.quantize);
  EXPECT_EQ(head.reason, "skip_modules pattern 'lm_head'");
  EXPECT_TRUE(rules.choose("lm_head_norm", 64, 64).quantize);
  QuantizationConfig all = hqq();
  all.skip_modules = {};
  EXPECT_TRUE(LayerRules(all).choose("lm_head", 64, 64).quantize) << "an empty list skips nothing";
}

TEST(LayerRules, LayersTwoIsNotLayersTwentyThree) {
  QuantizationConfig config = hqq();
  config.layer_configs = {{"transformer.layers.2", with_bits(8)}};
  LayerRules rules(config);
  EXPECT_EQ(rules.choose("transformer.layers.2.q", 64, 64).options.bits, 8);
  EXPECT_EQ(rules.choose("transformer.layers.23.q", 64, 64).options.bits, 4);
}

TEST(LayerRules, MostSpecificWinsAndTiesGoToTheLater) {
  QuantizationConfig config = hqq();
  LayerOverride group32, group128;
  group32.group_size = 32;
  group128.group_size = 128;
  config.layer_configs = {{"layers.0.mlp", with_bits(8)}, {"layers.0", group128}, {"*", group32}};
  LayerRules rules(config);
  EXPECT_EQ(rules.choose("layers.0.mlp.up", 64, 64).options.bits, 8);
  EXPECT_EQ(rules.choose("layers.0.mlp.up", 64, 64).options.group_size, 64)
      << "one pattern applies";
  EXPECT_EQ(rules.choose("layers.0.attn", 64, 64).options.group_size, 128);
  EXPECT_EQ(rules.choose("other", 64, 64).options.group_size, 32);

  config.layer_configs = {{"*.up", group32}, {"*.?up", group128}, {"*.up", with_bits(8)}};
  LayerRules ties(config);
  EXPECT_EQ(ties.choose("a.up", 64, 64).options.bits, 8);
}

TEST(LayerRules, OverridesMayChangeEverything) {
  QuantizationConfig config = hqq();
  LayerOverride layer;
  layer.method = M::BNB_NF4;
  layer.quant_type = "fp4";
  layer.double_quant = false;
  layer.compute_dtype = DType::kF16;
  LayerOverride none;
  none.method = M::NONE;
  LayerOverride skip;
  skip.skip = true;
  config.layer_configs = {{"a", layer}, {"b", none}, {"c", skip}};
  LayerRules rules(config);
  const auto a = rules.choose("a", 64, 64);
  EXPECT_EQ(a.options.method, M::BNB_NF4);
  EXPECT_EQ(a.options.quant_type, "fp4");
  EXPECT_FALSE(a.options.double_quant);
  EXPECT_EQ(a.compute_dtype, DType::kF16);
  EXPECT_EQ(rules.choose("b", 64, 64).reason, "method is none");
  EXPECT_EQ(rules.choose("c", 64, 64).reason, "layer_configs pattern 'c' skips it");
}

TEST(LayerRules, LayersThatTheDialectCannotTakeStayDense) {
  LayerRules rules(hqq());
  const auto odd = rules.choose("odd", 7, 9);
  EXPECT_FALSE(odd.quantize);
  EXPECT_FALSE(odd.reason.empty());
  QuantizationConfig strict = hqq();
  strict.backend_options["fallback"] = "error";
  LayerRules strict_rules(strict);
  try {
    strict_rules.choose("model.odd", 7, 9);
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(std::string(error.what()).starts_with("layer 'model.odd': ")) << error.what();
  }
}

TEST(LayerRules, GroupsMayCrossRows) {
  QuantizationConfig config = hqq(8);
  config.group_size = 128;
  EXPECT_TRUE(LayerRules(config).choose("q", 576, 576).quantize);
}

TEST(LayerRules, UnmatchedPatternsAreListed) {
  QuantizationConfig config = hqq();
  config.skip_modules = {"lm_hed", "embed"};
  config.layer_configs = {{"layers.0", with_bits(8)}, {"layer.1", with_bits(8)}};
  LayerRules rules(config);
  rules.choose("layers.0.q", 64, 64);
  rules.choose("embed.proj", 64, 64);
  EXPECT_EQ(rules.unmatched(),
            (std::vector<std::string>{"skip_modules: lm_hed", "layer_configs: layer.1"}));
  EXPECT_TRUE(LayerRules(hqq()).unmatched().empty()) << "the default list is nobody's typing error";
}

TEST(LayerRules, ResolvedSkipReasonsReachTheLayer) {
  QuantizationConfig config = hqq();
  config.layer_configs = {{"layers.0", with_bits(7)}};
  const Decision decision = decide_adapter(Backend::CPU, config);
  const auto choice = LayerRules(decision.config).choose("layers.0.q", 64, 64);
  EXPECT_FALSE(choice.quantize);
  EXPECT_NE(choice.reason.find("7 bits"), std::string::npos) << choice.reason;
}

TEST(LayerRules, Int8ThresholdIsForInt8Layers) {
  QuantizationConfig config;
  config.method = M::BNB_INT8;
  config.backend_options = {{"int8_threshold", "6.0"}};
  LayerOverride four;
  four.method = M::BNB_NF4;
  config.layer_configs = {{"four", four}};
  LayerRules rules(config);
  EXPECT_EQ(rules.choose("eight", 64, 64).int8_threshold, 6.0);
  EXPECT_FALSE(rules.choose("four", 64, 64).int8_threshold);
  config.backend_options["int8_threshold"] = "null";
  EXPECT_FALSE(LayerRules(config).choose("eight", 64, 64).int8_threshold);
  for (const std::string wrong : {"six", "-1", "nan", "inf", "6.0x", ""}) {
    config.backend_options["int8_threshold"] = wrong;
    try {
      decide_adapter(Backend::CUDA, config);
      FAIL() << wrong;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kConfig);
      EXPECT_NE(std::string(error.what()).find("int8_threshold is '" + wrong + "'"),
                std::string::npos)
          << error.what();
    }
    EXPECT_FALSE(validate_quantization_config(config, Backend::CUDA).empty()) << wrong;
  }
}

TEST(LayerRules, Int8ActivationsWhereTheFormHasThem) {
  QuantizationConfig config = hqq();
  EXPECT_EQ(LayerRules(config).choose("a", 64, 64).activations.activations, Activations::kExact);
  config.backend_options["activations"] = "int8";
  const auto choice = LayerRules(config).choose("a", 64, 64);
  EXPECT_EQ(choice.activations.activations, Activations::kInt8);
  EXPECT_EQ(choice.activations.reason, "");
  for (const std::string same : {"exact", "null"}) {
    config.backend_options["activations"] = same;
    EXPECT_EQ(LayerRules(config).choose("a", 64, 64).activations.activations, Activations::kExact);
  }
}

TEST(LayerRules, Int8ActivationsFallBackWithTheReason) {
  QuantizationConfig config = hqq();
  config.backend_options = {{"activations", "int8"}, {"axis", "0"}};
  const auto choice = LayerRules(config).choose("a", 64, 64);
  EXPECT_TRUE(choice.quantize);
  EXPECT_EQ(choice.activations.activations, Activations::kExact);
  EXPECT_EQ(choice.activations.reason,
            "activations stay exact: statistics are shared by rows, expected groups along rows");
  config.backend_options["fallback"] = "error";
  try {
    LayerRules(config).choose("a", 64, 64);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("layer 'a'"), std::string::npos) << error.what();
  }
}

TEST(LayerRules, BadPatternsThrow) {
  QuantizationConfig config = hqq();
  config.skip_modules = {"re:("};
  EXPECT_THROW(LayerRules{config}, Error);
}

}  // namespace
}  // namespace quantal

#include <gtest/gtest.h>

#include <random>

#include "quantal/policy.h"

namespace quantal {
namespace {

std::string error_of(const std::string& json) {
  try {
    config_from_json(json);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kConfig) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "accepted: " << json;
  return "";
}

TEST(ConfigJson, EmptyObjectGivesTheDocumentedDefaults) {
  const QuantizationConfig config = config_from_json("{}");
  EXPECT_EQ(config.method, QuantizationMethod::BNB_NF4);
  EXPECT_EQ(config.bits, 4);
  EXPECT_FALSE(config.bits_set);
  EXPECT_EQ(config.group_size, 64);
  EXPECT_FALSE(config.compute_dtype.has_value());
  EXPECT_TRUE(config.double_quant);
  EXPECT_EQ(config.quant_type, "nf4");
  EXPECT_EQ(config.skip_modules, std::vector<std::string>{"lm_head"});
  EXPECT_TRUE(config.layer_configs.empty());
}

TEST(ConfigJson, AllMembersSurviveARoundTrip) {
  const char* json = R"({"method": "HQQ", "bits": 8, "group_size": 128, "compute_dtype": "bfloat16",
    "storage_dtype": "uint8", "double_quant": false, "quant_type": "fp4", "skip_modules": ["a", "b.*"],
    "layer_configs": {"z.1": {"bits": 2}, "a.0": {"method": "bnb_nf4", "group_size": 32, "skip": false,
      "compute_dtype": "float16", "double_quant": true, "quant_type": "nf4"}, "m": null},
    "backend_options": {"axis": 0, "optimize": false, "support": "extended", "ratio": 0.5},
    "block_size": 256, "quant_zero": true, "quant_scale": true})";
  const QuantizationConfig config = config_from_json(json);
  EXPECT_EQ(config.method, QuantizationMethod::HQQ);
  EXPECT_TRUE(config.bits_set);
  EXPECT_EQ(config.compute_dtype, DType::kBF16);
  EXPECT_EQ(config.storage_dtype, DType::kU8);
  ASSERT_EQ(config.layer_configs.size(), 3u);
  EXPECT_EQ(config.layer_configs[0].first, "z.1") << "order given must survive";
  EXPECT_EQ(config.layer_configs[0].second.bits, 2);
  EXPECT_EQ(config.layer_configs[1].second.method, QuantizationMethod::BNB_NF4);
  EXPECT_TRUE(config.layer_configs[2].second.skip);
  EXPECT_EQ(config.backend_options.at("axis"), "0");
  EXPECT_EQ(config.backend_options.at("optimize"), "false");
  EXPECT_EQ(config.backend_options.at("ratio"), "0.5");
  EXPECT_EQ(config.block_size, 256);
  EXPECT_EQ(config.quant_zero, true);
  const std::string text = config_to_json(config);
  EXPECT_EQ(config_to_json(config_from_json(text)), text);
}

TEST(ConfigJson, BitsCanBeUnset) {
  EXPECT_FALSE(config_from_json(R"({"bits": null})").bits_set);
  EXPECT_TRUE(config_from_json(R"({"bits": 4})").bits_set);
  EXPECT_FALSE(config_from_json(R"({"bits": 4, "bits_set": false})").bits_set);
  EXPECT_FALSE(config_from_json(R"({"bits": null, "bits_set": true})").bits_set);
  EXPECT_FALSE(config_from_json(config_to_json(QuantizationConfig{})).bits_set);
}

TEST(ConfigJson, DoubleQuantRemembersWhetherItWasGiven) {
  EXPECT_FALSE(config_from_json("{}").double_quant_set);
  EXPECT_FALSE(config_from_json(R"({"double_quant": null})").double_quant_set);
  EXPECT_TRUE(config_from_json(R"({"double_quant": null})").double_quant);
  EXPECT_TRUE(config_from_json(R"({"double_quant": true})").double_quant_set);
  EXPECT_FALSE(
      config_from_json(R"({"double_quant": true, "double_quant_set": false})").double_quant_set);
  EXPECT_FALSE(config_from_json(config_to_json(QuantizationConfig{})).double_quant_set);
}

TEST(ConfigJson, GroupSizeNullMeansOneGroupPerRow) {
  EXPECT_EQ(config_from_json(R"({"group_size": null})").group_size, 0);
}

TEST(ConfigJson, UnknownMembersNameTheNearestOne) {
  EXPECT_NE(error_of(R"({"group_sise": 64})").find("did you mean 'group_size'"), std::string::npos);
  EXPECT_NE(error_of(R"({"layer_configs": {"a": {"bit": 8}}})").find("did you mean 'bits'"),
            std::string::npos);
}

TEST(ConfigJson, WrongTypesNameMemberActualAndExpected) {
  EXPECT_EQ(error_of(R"({"bits": "four"})"), "config.bits is \"four\", expected an integer");
  EXPECT_NE(error_of(R"({"method": "nf5"})").find("nf5"), std::string::npos);
  EXPECT_NE(error_of(R"({"compute_dtype": "float17"})").find("config.compute_dtype"),
            std::string::npos);
  EXPECT_NE(error_of(R"({"skip_modules": "lm_head"})").find("list of strings"), std::string::npos);
  EXPECT_NE(error_of(R"({"layer_configs": {"a": 3}})").find("layer_configs['a']"),
            std::string::npos);
  EXPECT_NE(error_of(R"({"double_quant": 1})").find("true or false"), std::string::npos);
  error_of("[]");
  error_of("{");
  error_of("");
  error_of(R"({"bits": 18446744073709551615})");
  error_of(R"({"group_size": 1e30})");
}

TEST(ConfigJson, BitWidths) {
  for (const char* bits : {"2", "4", "8", "16"}) {
    EXPECT_NO_THROW(config_from_json(std::string(R"({"bits": )") + bits + "}"));
  }
  EXPECT_EQ(error_of(R"({"bits": 5})"), "Unsupported bit width: 5. Supported: 2, 4, 8, 16");
  EXPECT_EQ(error_of(R"({"method": "hqq", "bits": 7})"),
            "Unsupported bit width: 7. Supported: 2, 4, 8, 16");
  EXPECT_EQ(config_from_json(R"({"method": "hqq", "bits": 3})").bits, 3) << "HQQ has 3 bits";
  EXPECT_EQ(error_of(R"({"bits": 5000000000})"),
            "Unsupported bit width: 5000000000. Supported: 2, 4, 8, 16");
  EXPECT_EQ(error_of(R"({"bits": -4})"), "Unsupported bit width: -4. Supported: 2, 4, 8, 16");
  EXPECT_NE(error_of(R"({"bits": 1)" + std::string(40, '0') + "}").find("Unsupported bit width: 1"),
            std::string::npos);
  EXPECT_EQ(error_of(R"({"bits": 4.5})"), "config.bits is 4.5, expected an integer");
}

TEST(ConfigJson, SizesMustNotBeNegative) {
  EXPECT_EQ(error_of(R"({"group_size": -1})"), "config: group_size is -1, expected >= 0");
  EXPECT_EQ(error_of(R"({"block_size": 0})"), "config: block_size is 0, expected >= 1");
}

TEST(ConfigJson, HostileTextIsATypedError) {
  EXPECT_NE(error_of(R"({"backend_options": {"a": )" + std::string(200000, '[')).find("deeper"),
            std::string::npos);
  EXPECT_NE(error_of(std::string(200000, '[')).find("deeper"), std::string::npos);
  error_of("{\"\xff\": 1}");
}

TEST(ConfigJson, MutatedTextNeverCrashes) {
  const std::string good = config_to_json(config_from_json(
      R"({"layer_configs": {"a.0": {"bits": 8}}, "backend_options": {"axis": 0}, "block_size": 64})"));
  std::mt19937 generator(20240607);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = good;
    for (int edits = 1 + static_cast<int>(generator() % 3); edits > 0; --edits) {
      text[generator() % text.size()] = "{}[]\",:0123456789-enultrfas"[generator() % 27];
    }
    try {
      config_to_json(config_from_json(text));
      ++accepted;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace quantal

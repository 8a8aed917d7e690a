#include <gtest/gtest.h>

#include "quantal/policy.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

QuantizationConfig make(M method) {
  QuantizationConfig config;
  config.method = method;
  return config;
}

TEST(Decide, StorageDtypeIsResolvedLast) {
  QuantizationConfig config;
  config.method = M::HQQ;
  EXPECT_EQ(decide_adapter(Backend::CPU, config).config.storage_dtype, DType::kU8);
  config.storage_dtype = DType::kBF16;
  EXPECT_EQ(decide_adapter(Backend::CPU, config).config.storage_dtype, DType::kBF16);
  config.storage_dtype = DType::kI32;
  EXPECT_THROW(decide_adapter(Backend::CPU, config), Error);
  config.storage_dtype.reset();
  config.method = M::NONE;
  config.compute_dtype = DType::kF16;
  EXPECT_EQ(decide_adapter(Backend::CPU, config).config.storage_dtype, DType::kF16);
}

TEST(Decide, SupportedPairs) {
  const Decision bnb = decide_adapter(Backend::CUDA, QuantizationConfig{});
  EXPECT_EQ(bnb.adapter, "BitsAndBytesAdapter");
  EXPECT_TRUE(bnb.warnings.empty());
  EXPECT_TRUE(bnb.substitutions.empty());
  EXPECT_EQ(bnb.config.compute_dtype, DType::kBF16);
  for (const Backend backend : {Backend::CUDA, Backend::MPS, Backend::MLX, Backend::CPU}) {
    EXPECT_EQ(decide_adapter(backend, make(M::HQQ)).adapter, "HQQAdapter");
  }
}

TEST(Decide, UnsupportedPairFallsBackWithReasonAndBothRemedies) {
  const Decision decision = decide_adapter(Backend::CPU, make(M::BNB_NF4));
  EXPECT_EQ(decision.adapter, "FallbackAdapter");
  EXPECT_EQ(decision.config.method, M::NONE);
  ASSERT_EQ(decision.warnings.size(), 1u);
  const std::string& warning = decision.warnings[0];
  EXPECT_TRUE(
      warning.starts_with("No quantization support for cpu, using fallback (no quantization)"))
      << warning;
  EXPECT_NE(warning.find("only supported on CUDA"), std::string::npos);
  EXPECT_NE(warning.find("'support': 'extended'"), std::string::npos);
  EXPECT_NE(warning.find("'fallback': 'nearest'"), std::string::npos);
  ASSERT_EQ(decision.substitutions.size(), 1u);
  EXPECT_EQ(decision.substitutions[0].asked, "bnb_nf4");
  EXPECT_EQ(decision.substitutions[0].used, "none");
}

TEST(Decide, ExtendedRunsEveryBuiltMethodEverywhere) {
  QuantizationConfig config = make(M::BNB_NF4);
  config.backend_options["support"] = "extended";
  EXPECT_EQ(decide_adapter(Backend::CPU, config).adapter, "BitsAndBytesAdapter");
  EXPECT_EQ(decide_adapter(Backend::CPU, make(M::BNB_NF4), Support::kExtended).adapter,
            "BitsAndBytesAdapter");
  EXPECT_EQ(decide_adapter(Backend::CPU, config, Support::kDocumented).adapter, "FallbackAdapter")
      << "an argument wins over backend_options";
}

TEST(Decide, EveryMethodRunsWhereItIsAllowed) {
  for (const MethodInfo& method : methods()) {
    if (method.method == M::NONE) continue;
    const Decision decision = decide_adapter(Backend::CPU, make(method.method), Support::kExtended);
    EXPECT_NE(decision.adapter, "FallbackAdapter") << method.name;
    EXPECT_TRUE(decision.warnings.empty()) << method.name;
    EXPECT_EQ(decision.config.method, method.method);
  }
}

TEST(Decide, NearestKeepsTheBits) {
  QuantizationConfig config = make(M::BNB_NF4);
  config.backend_options["fallback"] = "nearest";
  const Decision decision = decide_adapter(Backend::CPU, config);
  EXPECT_EQ(decision.adapter, "HQQAdapter");
  EXPECT_EQ(decision.config.method, M::HQQ);
  EXPECT_EQ(decision.config.bits, 4);
  ASSERT_EQ(decision.substitutions.size(), 1u);
  EXPECT_EQ(decision.substitutions[0].used, "hqq 4-bit");
  EXPECT_EQ(decision.warnings.size(), 1u);
  const Decision eight = decide_adapter(Backend::MPS, make(M::MLX_INT8), {}, Fallback::kNearest);
  if (!method_built(M::MLX_INT8)) {
    EXPECT_EQ(eight.config.method, M::HQQ);
    EXPECT_EQ(eight.config.bits, 8);
  }
}

TEST(Decide, ErrorThrows) {
  try {
    decide_adapter(Backend::CPU, make(M::BNB_NF4), {}, Fallback::kError);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("only supported on CUDA, not cpu"), std::string::npos);
  }
}

TEST(Decide, NoneIsNotAFallback) {
  const Decision decision = decide_adapter(Backend::CPU, make(M::NONE), {}, Fallback::kError);
  EXPECT_EQ(decision.adapter, "FallbackAdapter");
  EXPECT_TRUE(decision.warnings.empty());
}

TEST(Decide, MethodImpliesBits) {
  QuantizationConfig eight = make(M::BNB_INT8);
  const Decision quiet = decide_adapter(Backend::CUDA, eight, Support::kExtended);
  for (const Substitution& s : quiet.substitutions) EXPECT_NE(s.what, "bits");

  QuantizationConfig conflict = make(M::BNB_NF4);
  conflict.bits = 8;
  const Decision decision = decide_adapter(Backend::CUDA, conflict);
  EXPECT_EQ(decision.adapter, "BitsAndBytesAdapter");
  EXPECT_EQ(decision.config.bits, 4);
  ASSERT_EQ(decision.substitutions.size(), 1u);
  EXPECT_EQ(decision.substitutions[0].what, "bits");
  EXPECT_EQ(decision.substitutions[0].asked, "8");
  EXPECT_EQ(decision.warnings.size(), 1u);
  EXPECT_THROW(decide_adapter(Backend::CUDA, conflict, {}, Fallback::kError), Error);
}

TEST(Decide, WidthsThatDoNotExistFallBack) {
  QuantizationConfig config = make(M::HQQ);
  config.bits = 16;
  EXPECT_EQ(decide_adapter(Backend::CPU, config).adapter, "FallbackAdapter");
  const Decision nearest = decide_adapter(Backend::CPU, config, {}, Fallback::kNearest);
  EXPECT_EQ(nearest.config.method, M::HQQ);
  EXPECT_EQ(nearest.config.bits, 8);
}

TEST(Decide, ComputeDtype) {
  EXPECT_EQ(decide_adapter(Backend::MPS, make(M::HQQ)).config.compute_dtype, DType::kF16);
  QuantizationConfig config = make(M::HQQ);
  config.compute_dtype = DType::kBF16;
  const Decision asked = decide_adapter(Backend::MPS, config);
  EXPECT_EQ(asked.config.compute_dtype, DType::kBF16);
  ASSERT_EQ(asked.warnings.size(), 1u);
  EXPECT_TRUE(asked.warnings[0].starts_with("MPS backend doesn't support bfloat16"));
  config.compute_dtype = DType::kU8;
  EXPECT_THROW(decide_adapter(Backend::CPU, config), Error);
  EXPECT_EQ(default_compute_dtype(Backend::CUDA, false), DType::kF16);
  EXPECT_EQ(default_compute_dtype(Backend::MLX), DType::kF16);
  EXPECT_NE(default_compute_dtype(Backend::CPU), DType::kF16);
}

TEST(Decide, SettingsThatNoLayerCouldUseThrow) {
  QuantizationConfig config = make(M::BNB_NF4);
  config.group_size = 48;
  EXPECT_THROW(decide_adapter(Backend::CUDA, config), Error);
  EXPECT_NO_THROW(decide_adapter(Backend::CPU, config)) << "nothing is quantized there";
  config = make(M::HQQ);
  config.backend_options["axis"] = "3";
  EXPECT_THROW(decide_adapter(Backend::CPU, config), Error);
  config.backend_options = {{"support", "all"}};
  try {
    decide_adapter(Backend::CPU, config);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "backend_options: support is 'all', expected one of documented, extended");
  }
}

TEST(Decide, NearestReplacesSizesThatMeanNothing) {
  QuantizationConfig config = make(M::BNB_NF4);
  config.group_size = 12;
  const Decision decision = decide_adapter(Backend::CPU, config, {}, Fallback::kNearest);
  EXPECT_EQ(decision.config.group_size, 64);
  EXPECT_EQ(decision.substitutions.back().what, "group_size");
}

TEST(Decide, LayersAreResolved) {
  QuantizationConfig config = make(M::HQQ);
  LayerOverride eight, seven, bnb, sixteen;
  eight.bits = 8;
  seven.bits = 7;
  bnb.method = M::BNB_NF4;
  sixteen.bits = 16;
  config.layer_configs = {{"a", eight}, {"b", seven}, {"c", bnb}, {"d", sixteen}};
  const Decision decision = decide_adapter(Backend::CPU, config);
  const auto& layers = decision.config.layer_configs;
  EXPECT_EQ(layers[0].second.method, M::HQQ);
  EXPECT_FALSE(layers[0].second.skip);
  EXPECT_TRUE(layers[1].second.skip);
  EXPECT_NE(layers[1].second.skip_reason.find("7 bits"), std::string::npos);
  EXPECT_TRUE(layers[2].second.skip);
  EXPECT_NE(layers[2].second.skip_reason.find("only supported on CUDA"), std::string::npos);
  EXPECT_TRUE(layers[3].second.skip);
  EXPECT_TRUE(layers[3].second.skip_reason.empty()) << "16 bits were asked for";
  EXPECT_EQ(decision.substitutions.size(), 2u);
  EXPECT_EQ(decision.warnings.size(), 2u);

  const Decision nearest = decide_adapter(Backend::CPU, config, {}, Fallback::kNearest);
  EXPECT_EQ(nearest.config.layer_configs[1].second.bits, 6);
  EXPECT_EQ(nearest.config.layer_configs[2].second.method, M::HQQ);
  EXPECT_THROW(decide_adapter(Backend::CPU, config, {}, Fallback::kError), Error);
}

TEST(Decide, LayersAloneMayBeQuantized) {
  QuantizationConfig config = make(M::NONE);
  LayerOverride hqq;
  hqq.method = M::HQQ;
  config.layer_configs = {{"mlp", hqq}};
  EXPECT_EQ(decide_adapter(Backend::CPU, config).adapter, "HQQAdapter");
}

TEST(AdapterRefusal, DirectConstruction) {
  const QuantizationConfig config;
  EXPECT_EQ(adapter_refusal("BitsAndBytesAdapter", Backend::CPU, config),
            "bitsandbytes quantization is only supported on CUDA backend");
  EXPECT_EQ(adapter_refusal("BitsAndBytesAdapter", Backend::CUDA, config), "");
  EXPECT_EQ(adapter_refusal("MLXAdapter", Backend::CUDA, config),
            "MLX quantization is only supported on Apple Silicon (MLX/MPS backends)");
  EXPECT_EQ(adapter_refusal("HQQAdapter", Backend::CPU, make(M::HQQ)), "");
  EXPECT_EQ(adapter_refusal("FallbackAdapter", Backend::CPU, config), "");
  EXPECT_THROW(adapter_refusal("Nobody", Backend::CPU, config), Error);
  QuantizationConfig extended;
  extended.backend_options["support"] = "extended";
  EXPECT_EQ(adapter_refusal("BitsAndBytesAdapter", Backend::CPU, extended), "");
}

TEST(AdapterRefusal, MethodsAndWidthsOfOthers) {
  EXPECT_EQ(adapter_refusal("HQQAdapter", Backend::CPU, make(M::BNB_NF4)),
            "HQQAdapter: method is bnb_nf4, expected hqq");
  EXPECT_EQ(adapter_refusal("HQQAdapter", Backend::CPU, make(M::NONE)), "");
  QuantizationConfig config = make(M::BNB_NF4);
  config.bits = 2;
  EXPECT_EQ(adapter_refusal("BitsAndBytesAdapter", Backend::CUDA, config),
            "bitsandbytes doesn't support 2-bit quantization");
  config.bits = 8;
  EXPECT_EQ(
      adapter_refusal("BitsAndBytesAdapter", Backend::CUDA, config),
      "BitsAndBytesAdapter: method bnb_nf4 has 4 bits, not 8, expected bits unset or a method "
      "that has them");
  EXPECT_EQ(adapter_refusal("BitsAndBytesAdapter", Backend::CUDA, make(M::BNB_INT8)), "");
}

}  // namespace
}  // namespace quantal

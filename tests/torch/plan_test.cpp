// The planner over modules, against the storage of the quantized model.
#include "quantal/torch/plan.h"

#include "torch_support.h"

namespace quantal {
namespace {

using testing::expect_error;
using testing::tiny_llama;

QuantizationConfig config_of(QuantizationMethod method, int bits) {
  QuantizationConfig config;
  config.method = method;
  config.bits = bits;
  config.bits_set = true;
  config.group_size = 32;
  config.backend_options["support"] = "extended";
  return config;
}

TEST(TorchPlan, ResidentBytesAreThoseOfTheQuantizedModule) {
  using M = QuantizationMethod;
  const std::pair<M, int> forms[] = {
      {M::BNB_NF4, 4}, {M::BNB_INT8, 8}, {M::HQQ, 3}, {M::MLX_INT4, 4}, {M::QUANTO_INT2, 2}};
  for (const auto& [method, bits] : forms) {
    for (const bool tied : {false, true}) {
      PlanOptions options;
      options.config = config_of(method, bits);
      auto model = tiny_llama(1, tied);
      const Plan plan = quantal::plan(*model, options);
      SCOPED_TRACE(plan.label());
      EXPECT_EQ(plan.stored_bytes, storage_bytes(*model));
      create_quantization_adapter(Backend::CPU, *options.config)->quantize_model(*model);
      EXPECT_EQ(plan.resident_bytes, storage_bytes(*model));
      const Plan again = quantal::plan(*model, {});
      EXPECT_EQ(again.label(), "as stored");
      EXPECT_EQ(again.resident_bytes, storage_bytes(*model));
      EXPECT_EQ(again.parameters, plan.parameters);
    }
  }
}

TEST(TorchPlan, AdaptersOfTheModuleAreThoseThatTrain) {
  auto model = tiny_llama();
  create_quantization_adapter(Backend::CPU, config_of(QuantizationMethod::HQQ, 4))
      ->quantize_model(*model);
  PlanOptions options;
  options.mode = PlanMode::kQlora;
  options.lora_rank = 4;
  options.lora_targets = {"q_proj", "v_proj"};
  const Plan planned = quantal::plan(*model, options);
  LoraConfig lora;
  lora.r = 4;
  lora.target_modules = {"q_proj", "v_proj"};
  ASSERT_EQ(add_lora(*model, lora), 4);
  options.lora_targets.clear();
  const Plan attached = quantal::plan(*model, options);
  std::int64_t trained = 0;
  for (const torch::Tensor& parameter : lora_parameters(*model)) trained += parameter.numel();
  EXPECT_EQ(planned.adapter_parameters, trained);
  EXPECT_EQ(attached.adapter_parameters, trained);
  EXPECT_EQ(planned.peak().total(), attached.peak().total());
}

TEST(TorchPlan, ReportSaysThatARecommendationDoesNotFit) {
  auto adapter =
      create_quantization_adapter(Backend::CUDA, get_recommended_config(Backend::CUDA, 70, 8));
  ASSERT_EQ(adapter->report().notes.size(), 1u);
  EXPECT_NE(adapter->report().to_text().find("35.0 GB"), std::string::npos);
}

TEST(TorchPlan, ModuleWithoutLinearLayers) {
  torch::nn::LayerNorm norm(torch::nn::LayerNormOptions({8}));
  expect_error(Errc::kUnsupported, "none of them the weight of a linear layer",
               [&] { quantal::plan(*norm, {}); });
}

}  // namespace
}  // namespace quantal

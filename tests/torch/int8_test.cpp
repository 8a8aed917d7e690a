// LLM.int8 in the torch layer: the product with outliers and its gradient.
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

QuantizeOptions int8_options() {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_INT8;
  options.bits = 8;
  return options;
}

QuantizationConfig int8_config(const std::string& threshold) {
  QuantizationConfig config;
  config.method = QuantizationMethod::BNB_INT8;
  config.compute_dtype = DType::kF32;
  if (!threshold.empty()) config.backend_options["int8_threshold"] = threshold;
  return config;
}

/// Activations with one column above the threshold of 6.
torch::Tensor with_outliers() {
  auto x = torch::randn({5, 64}).clamp(-3, 3);
  x.select(1, 7).add_(20);
  return x;
}

TEST(LinearInt8, RoundsActivationsAndKeepsOutliers) {
  torch::manual_seed(1);
  const PackedTensors w = quantize(torch::randn({48, 64}) * 0.1, int8_options());
  const auto dense = dequantize(w, torch::kFloat);
  const auto x = with_outliers();
  const auto bias = torch::randn({48});
  const auto exact = torch::linear(x, dense, bias);
  const double with = relative(linear_int8(x, w, bias, 6.0), exact);
  const double without = relative(linear_int8(x, w, bias, 0.0), exact);
  EXPECT_GT(with, 1e-4) << "nothing was rounded";
  EXPECT_LT(with, 0.01);
  EXPECT_GT(without, 2 * with) << "outliers make no difference";
}

TEST(LinearInt8, GradientIsThatOfTheDequantizedWeight) {
  torch::manual_seed(2);
  const PackedTensors w = quantize(torch::randn({48, 64}) * 0.1, int8_options());
  const auto dense = dequantize(w, torch::kFloat);
  auto x = with_outliers().requires_grad_();
  auto bias = torch::randn({48}).requires_grad_();
  const auto seed = torch::randn({5, 48});
  linear_int8(x, w, bias).backward(seed);
  EXPECT_LE(relative(x.grad(), torch::matmul(seed, dense)), 2e-6);
  EXPECT_LE(relative(bias.grad(), seed.sum(0)), 2e-6);
  // Through the outlier column the product is exact, so its slope is the gradient.
  const auto step = torch::zeros({5, 64});
  step.select(1, 7).fill_(0.5);
  const auto moved = linear_int8(x.detach() + step, w, bias.detach());
  const auto slope = (moved - linear_int8(x.detach(), w, bias.detach())).to(torch::kDouble);
  const auto expected = torch::matmul(step, dense.t());
  EXPECT_LE(relative(slope, expected), 5e-3);
}

TEST(LinearInt8, RefusesOtherForms) {
  const PackedTensors w = quantize(torch::randn({48, 64}), hqq_options(8, 64));
  EXPECT_THROW(linear_int8(torch::randn({2, 64}), w), Error);
}

TEST(LinearInt8, TheConfigChoosesIt) {
  torch::manual_seed(3);
  const auto x = with_outliers();
  for (const bool on : {false, true}) {
    torch::nn::Sequential model(Linear(64, 48));
    auto adapter =
        create_quantization_adapter(Backend::CPU, int8_config(on ? "6.0" : ""), Support::kExtended);
    adapter->quantize_model(*model);
    const auto layer = named_linears(*model)[0].second->packed;
    EXPECT_EQ(layer->int8_threshold.has_value(), on);
    const auto exact = torch::linear(x, layer->weight(), layer->bias);
    EXPECT_EQ(relative(layer->forward(x), exact) > 1e-5, on);
    const TempFolder folder("int8");
    adapter->save_quantized_model(*model, folder.file("model"));
    torch::nn::Sequential loaded(Linear(64, 48));
    adapter->load_quantized_model(folder.file("model"), *loaded);
    EXPECT_TRUE(torch::equal(named_linears(*loaded)[0].second->forward(x), layer->forward(x)));
  }
  expect_error(Errc::kConfig, "int8_threshold is 'six', expected a number >= 0", [] {
    create_quantization_adapter(Backend::CPU, int8_config("six"), Support::kExtended);
  });
}

TEST(Training, PreparingTwiceChangesNothing) {
  auto model = tiny_llama(14);
  model->to(torch::kBFloat16);
  prepare_model_for_training(*model,
                             {.use_gradient_checkpointing = true, .norms_in_float32 = true});
  for (const auto& p : model->named_parameters()) {
    EXPECT_FALSE(p.value().requires_grad()) << p.key();
    const bool norm = p.key().find("norm") != std::string::npos;
    EXPECT_EQ(p.value().scalar_type(), norm ? torch::kFloat : torch::kBFloat16) << p.key();
  }
  add_lora(*model, LoraConfig{});
  prepare_model_for_training(*model);
  EXPECT_EQ(lora_parameters(*model).size(), 8u);
  for (const auto& p : lora_parameters(*model)) EXPECT_TRUE(p.requires_grad());
  const auto logits = model->forward(torch::arange(20).unsqueeze(0));
  EXPECT_EQ(logits.scalar_type(), torch::kBFloat16) << "norms widen the activations";
  model->loss(torch::arange(20).unsqueeze(0)).backward();
  EXPECT_TRUE(lora_parameters(*model)[1].grad().defined());
}

}  // namespace
}  // namespace quantal::testing

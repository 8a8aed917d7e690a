// Products with int8 activations in the torch layer: distance, gradient, config, files.
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

QuantizationConfig int8_config(const std::string& activations, std::int64_t group_size = 64) {
  QuantizationConfig config;
  config.method = QuantizationMethod::HQQ;
  config.bits = 4;
  config.group_size = group_size;
  config.compute_dtype = DType::kF32;
  if (!activations.empty()) config.backend_options["activations"] = activations;
  return config;
}

TEST(LinearInt8Activations, IsCloseAndRounds) {
  torch::manual_seed(1);
  for (const auto& options : {hqq_options(4, 64), hqq_options(8, 64), nf4_options(64, true)}) {
    const PackedTensors w = quantize(torch::randn({48, 256}) * 0.1, options);
    const auto x = torch::randn({2, 3, 256}), bias = torch::randn({48});
    const auto exact = torch::linear(x, dequantize(w, torch::kFloat), bias);
    const auto y = linear_int8_activations(x, w, bias);
    EXPECT_EQ(y.sizes(), exact.sizes());
    EXPECT_GT(relative(y, exact), 1e-4) << "nothing was rounded";
    EXPECT_LT(relative(y, exact), 0.012);
  }
}

TEST(LinearInt8Activations, GradientIsThatOfTheExactProduct) {
  torch::manual_seed(2);
  const PackedTensors w = quantize(torch::randn({48, 64}) * 0.1, hqq_options(4, 64));
  const auto values = torch::randn({5, 64}), seed = torch::randn({5, 48});
  auto x = values.clone().requires_grad_();
  auto bias = torch::randn({48}).requires_grad_();
  linear_int8_activations(x, w, bias).backward(seed);
  auto other = values.clone().requires_grad_();
  linear(other, w, bias.detach()).backward(seed);
  EXPECT_TRUE(torch::equal(x.grad(), other.grad()));
  EXPECT_LE(relative(bias.grad(), seed.sum(0)), 2e-6);
}

TEST(LinearInt8Activations, RefusesForms) {
  const PackedTensors w = quantize(torch::randn({64, 64}), hqq_options(4, 64, 0));
  EXPECT_THROW(linear_int8_activations(torch::randn({2, 64}), w), Error);
}

TEST(LinearInt8Activations, TheConfigChoosesIt) {
  torch::manual_seed(3);
  const auto x = torch::randn({5, 64});
  for (const bool on : {false, true}) {
    torch::nn::Sequential model(Linear(64, 48));
    auto adapter = create_quantization_adapter(Backend::CPU, int8_config(on ? "int8" : ""));
    adapter->quantize_model(*model);
    const auto layer = named_linears(*model)[0].second->packed;
    EXPECT_EQ(layer->activations == Activations::kInt8, on);
    const auto exact = torch::linear(x, layer->weight().to(torch::kFloat), layer->bias);
    EXPECT_EQ(relative(layer->forward(x), exact) > 1e-4, on);
    const auto created = adapter->create_quantized_linear(64, 48, true);
    EXPECT_EQ(created->packed->activations == Activations::kInt8, on);
    const TempFolder folder("activations");
    adapter->save_quantized_model(*model, folder.file("model"));
    torch::nn::Sequential loaded(Linear(64, 48));
    adapter->load_quantized_model(folder.file("model"), *loaded);
    EXPECT_TRUE(torch::equal(named_linears(*loaded)[0].second->forward(x), layer->forward(x)));
  }
  expect_error(Errc::kConfig, "activations is 'int4', expected one of",
               [] { create_quantization_adapter(Backend::CPU, int8_config("int4")); });
}

TEST(LinearInt8Activations, FallsBackWithANote) {
  torch::nn::Sequential model(Linear(48, 64), Linear(64, 64));
  auto adapter = create_quantization_adapter(Backend::CPU, int8_config("int8", 24));
  adapter->quantize_model(*model);
  const auto layer = named_linears(*model)[0].second->packed;
  ASSERT_TRUE(layer);
  EXPECT_EQ(layer->activations, Activations::kExact);
  const std::string text = adapter->report().to_text();
  EXPECT_NE(text.find("activations stay exact: groups of 24"), std::string::npos) << text;
}

}  // namespace
}  // namespace quantal::testing

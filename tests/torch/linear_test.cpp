// Quantized layers, adapters, LoRA.
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

TEST(QuantizedLinear, ForwardIsTheProductWithItsWeight) {
  const auto weight = torch::randn({32, 96}) * 0.1;
  const auto bias = torch::randn({32});
  QuantizedLinear layer(quantize(weight, hqq_options(4, 64)), bias);
  const auto x = torch::randn({2, 4, 96});
  EXPECT_LE(relative(layer->forward(x), torch::linear(x, layer->weight(), bias)), 1e-6);
  EXPECT_EQ(layer->forward(x.to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
  EXPECT_FALSE(layer->codes.requires_grad());
  EXPECT_EQ(layer->buffers().size(), 2u);
}

TEST(QuantizedLinear, CastingTheModelLeavesPackedBytesAlone) {
  Linear layer(96, 32);
  layer->set_quantized(
      QuantizedLinear(quantize(layer->weight, nf4_options(64, true)), layer->bias));
  const auto codes = layer->packed->codes.clone();
  layer->to(torch::kHalf);
  EXPECT_EQ(layer->packed->codes.scalar_type(), torch::kByte);
  EXPECT_TRUE(torch::equal(layer->packed->codes, codes));
  EXPECT_EQ(layer->packed->bias.scalar_type(), torch::kHalf);
}

TEST(QuantizedLinear, RefusesBuffersThatDoNotFit) {
  PackedTensors packed = quantize(torch::randn({32, 64}), hqq_options(4, 64));
  expect_error(Errc::kShape, "bias has shape [3]",
               [&] { QuantizedLinear(packed, torch::zeros({3})); });
  packed.codes = packed.codes.narrow(0, 0, 3);
  expect_error(Errc::kShape, "codes", [&] { QuantizedLinear{packed}; });
}

TEST(Linear, SwapsBetweenFormsWithoutKeepingTheOther) {
  Linear layer(64, 48);
  const auto weight = layer->weight.detach().clone();
  EXPECT_EQ(storage_bytes(*layer), (48 * 64 + 48) * 4);
  layer->set_quantized(QuantizedLinear(quantize(weight, hqq_options(4, 64)), layer->bias));
  EXPECT_FALSE(layer->weight.defined());
  EXPECT_EQ(layer->named_parameters().find("weight"), nullptr);
  EXPECT_EQ(storage_bytes(*layer), layer->packed->nbytes() + 128);
  layer->set_dense(weight, {});
  EXPECT_FALSE(layer->is_quantized());
  EXPECT_TRUE(torch::equal(layer->weight, weight));
  expect_error(Errc::kShape, "weight has shape [3, 4]", [&] {
    layer->set_dense(torch::zeros({3, 4}), {});
  });
}

TEST(Adapter, LeavesNoFullPrecisionCopy) {
  auto model = tiny_llama();
  const std::int64_t before = storage_bytes(*model);
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  std::int64_t expected = 0, parameters = 0;
  for (const auto& entry : adapter->report().entries) {
    expected += entry.bytes_after;
    parameters += entry.parameters;
  }
  EXPECT_EQ(parameters * 4, before);
  EXPECT_EQ(storage_bytes(*model), expected + 14 * 128);  // 14 layers with a spec buffer each
  EXPECT_LT(storage_bytes(*model), before / 2);
  for (const auto& [name, layer] : named_linears(*model)) {
    EXPECT_TRUE(layer->is_quantized()) << name;
    EXPECT_FALSE(layer->weight.defined()) << name;
  }
}

TEST(Adapter, ReportsWhatItSkippedAndWhy) {
  auto model = tiny_llama(1, /*tied=*/false);
  auto config = hqq_config();
  config.skip_modules = {"lm_head", "layers.1.mlp"};
  LayerOverride eight_bits;
  eight_bits.bits = 8;
  config.layer_configs = {{"model.layers.0", eight_bits}};
  auto adapter = create_quantization_adapter(Backend::CPU, config);
  adapter->quantize_model(*model);
  int dense_linears = 0, eight = 0;
  for (const auto& entry : adapter->report().entries) {
    if (entry.name == "lm_head") {
      EXPECT_NE(entry.reason.find("lm_head"), std::string::npos);
    }
    dense_linears += entry.method == "dense" && entry.reason.find("skip_modules") == 0;
    eight += entry.method.find("8-bit") != std::string::npos;
    if (entry.method != "dense") {
      EXPECT_GT(entry.relative_error, 0) << entry.name;
    }
  }
  EXPECT_EQ(dense_linears, 4);
  EXPECT_EQ(eight, 7);
  EXPECT_FALSE(adapter->report().to_text().empty());
}

TEST(Adapter, PlainTorchLinearIsReportedAsDense) {
  torch::nn::Sequential model(torch::nn::Linear(64, 64), Linear(64, 64));
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  ASSERT_EQ(adapter->report().entries.size(), 2u);
  EXPECT_EQ(adapter->report().entries[0].name, "1");
  EXPECT_EQ(adapter->report().entries[1].method, "dense");
  EXPECT_NE(adapter->report().entries[1].reason.find("torch::nn::Linear"), std::string::npos);
}

TEST(Adapter, FactoryFollowsTheMatrixUnlessExtended) {
  QuantizationConfig config;
  config.method = QuantizationMethod::BNB_NF4;
  config.compute_dtype = DType::kF32;
  auto model = tiny_llama();
  auto fallback = create_quantization_adapter(Backend::CPU, config);
  EXPECT_NE(dynamic_cast<FallbackAdapter*>(fallback.get()), nullptr);
  EXPECT_FALSE(fallback->warnings().empty());
  fallback->quantize_model(*model);
  EXPECT_FALSE(named_linears(*model)[0].second->is_quantized());
  auto extended = create_quantization_adapter(Backend::CPU, config, Support::kExtended);
  EXPECT_NE(dynamic_cast<BitsAndBytesAdapter*>(extended.get()), nullptr);
  extended->quantize_model(*model);
  EXPECT_TRUE(named_linears(*model)[0].second->is_quantized());
  EXPECT_THROW(BitsAndBytesAdapter(Backend::CPU, config), Error);
}

TEST(Adapter, BitsAndBytesValuesHaveTheWeightsDtype) {
  QuantizationConfig config;
  config.method = QuantizationMethod::BNB_NF4;
  config.compute_dtype = DType::kF32;
  auto adapter = create_quantization_adapter(Backend::CPU, config, Support::kExtended);
  torch::nn::Sequential model(Linear(64, 64, true, torch::kBFloat16));
  adapter->quantize_model(*model);
  const auto layer = named_linears(*model)[0].second->packed;
  EXPECT_EQ(layer->spec().value_dtype, DType::kBF16);
  EXPECT_EQ(layer->weight().scalar_type(), torch::kBFloat16);
  EXPECT_EQ(layer->compute_dtype, torch::kFloat);
}

TEST(Adapter, CreatesEmptyLayers) {
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config(8, 128));
  auto layer = adapter->create_quantized_linear(576, 64);
  ASSERT_TRUE(layer->is_quantized());
  EXPECT_EQ(layer->packed->spec().bits, 8);
  EXPECT_EQ(layer->forward(torch::randn({2, 576})).sizes(), (torch::IntArrayRef{2, 64}));
}

TEST(Adapter, SavedModelLoadsWithEqualBytesAndLogits) {
  const TempFolder folder("saved");
  for (const bool tied : {true, false}) {
    const std::string path = folder.file(tied ? "tied" : "untied");
    auto model = tiny_llama(3, tied);
    auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
    adapter->quantize_model(*model);
    adapter->save_quantized_model(*model, path);
    auto loaded = tiny_llama(4, tied);
    adapter->load_quantized_model(path, *loaded);
    const auto a = named_linears(*model), b = named_linears(*loaded);
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(a[i].second->is_quantized(), b[i].second->is_quantized());
      if (!a[i].second->is_quantized()) continue;
      EXPECT_TRUE(torch::equal(a[i].second->packed->codes, b[i].second->packed->codes));
      EXPECT_TRUE(torch::equal(a[i].second->packed->stats, b[i].second->packed->stats));
    }
    const auto ids = torch::arange(20).unsqueeze(0);
    EXPECT_TRUE(torch::equal(model->forward(ids), loaded->forward(ids)));
  }
}

TEST(Adapter, LoadingIntoAnotherModelListsWhatDoesNotFit) {
  const TempFolder folder("misfit");
  auto model = tiny_llama(3, true);
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  adapter->save_quantized_model(*model, folder.file("base"));
  auto other = tiny_llama(3, false);
  expect_error(Errc::kCorrupt, "1 missing: lm_head.weight",
               [&] { adapter->load_quantized_model(folder.file("base"), *other); });
  EXPECT_FALSE(named_linears(*other)[0].second->is_quantized()) << "changed before the check";
}

TEST(Adapter, LoadingADenseFolderIntoAQuantizedModelMakesItDense) {
  auto model = load_llama(golden_path("checkpoints/dense-bf16"));
  const auto expected = model->forward(golden_ids());
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  adapter->load_quantized_model(golden_path("checkpoints/dense-bf16"), *model);
  EXPECT_FALSE(named_linears(*model)[0].second->is_quantized());
  model->to(torch::kFloat);
  EXPECT_TRUE(torch::equal(model->forward(golden_ids()), expected));
}

}  // namespace
}  // namespace quantal::testing

// LoRA and DoRA: arithmetic, several adapters, PEFT's folders.
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

LoraConfig small_lora(bool dora = false) {
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 8;
  config.use_dora = dora;
  return config;
}

void randomize(torch::nn::Module& model, const std::string& name = "") {
  const torch::NoGradGuard no_grad;
  for (auto& p : lora_parameters(model, name)) p.add_(torch::randn_like(p) * 0.1);
}

Llama quantized_llama(std::uint64_t seed, int bits = 4) {
  auto model = tiny_llama(seed);
  create_quantization_adapter(Backend::CPU, hqq_config(bits))->quantize_model(*model);
  return model;
}

torch::Tensor ids() { return torch::arange(30).unsqueeze(0); }

TEST(Lora, OnlyAdaptersTrainAndStartWithoutEffect) {
  auto model = tiny_llama(5);
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  const auto ids = torch::arange(30).unsqueeze(0);
  const auto before = model->forward(ids).detach();
  adapter->prepare_model_for_training(*model);
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 8;
  EXPECT_EQ(add_lora(*model, config), 4);
  EXPECT_TRUE(torch::equal(model->forward(ids), before));
  model->loss(ids).backward();
  for (const auto& p : model->named_parameters()) {
    const bool adapter_parameter = p.key().find(".lora_default.") != std::string::npos;
    EXPECT_EQ(p.value().requires_grad(), adapter_parameter) << p.key();
    EXPECT_EQ(p.value().grad().defined(), adapter_parameter) << p.key();
  }
  EXPECT_EQ(lora_parameters(*model).size(), 8u);
}

TEST(Lora, GradientsEqualTheDenseFormula) {
  Linear layer(48, 32, false);
  layer->set_quantized(QuantizedLinear(quantize(layer->weight, hqq_options(8, 64))));
  layer->set_lora(Lora(48, 32, 4, 2.0, 0.0));
  {
    const torch::NoGradGuard no_grad;
    layer->lora()->B.normal_();
  }
  auto x = torch::randn({5, 48}).requires_grad_();
  const auto seed = torch::randn({5, 32});
  layer->forward(x).backward(seed);
  const auto w = layer->packed->weight(), a = layer->lora()->A.detach(),
             b = layer->lora()->B.detach();
  const auto expected_x = torch::matmul(seed, w + 2 * torch::matmul(b, a));
  EXPECT_LE(relative(x.grad(), expected_x), 2e-6);
  const auto xd = x.detach();
  EXPECT_LE(
      relative(layer->lora()->B.grad(), 2 * torch::matmul(seed.t(), torch::matmul(xd, a.t()))),
      2e-6);
  EXPECT_LE(relative(layer->lora()->A.grad(), 2 * torch::matmul(torch::matmul(seed, b).t(), xd)),
            2e-6);
}

TEST(Lora, SavedFolderLoadsWithEqualLogits) {
  const TempFolder folder("lora");
  auto model = tiny_llama(6);
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 8;
  add_lora(*model, config);
  for (auto& p : lora_parameters(*model)) {
    const torch::NoGradGuard no_grad;
    p.normal_(0, 0.1);
  }
  const auto ids = torch::arange(30).unsqueeze(0);
  const auto expected = model->forward(ids).detach();
  save_lora_adapter(*model, config, folder.file("adapter"));
  auto other = tiny_llama(6);
  const LoraConfig read = load_lora_adapter(*other, folder.file("adapter"));
  EXPECT_EQ(read.r, 4);
  EXPECT_EQ(read.target_modules, config.target_modules);
  EXPECT_TRUE(torch::equal(other->forward(ids), expected));
  auto untied = tiny_llama(6, false);
  expect_error(Errc::kConfig, "target_modules is [nothing]", [&] {
    LoraConfig wrong;
    wrong.target_modules = {"nothing"};
    add_lora(*untied, wrong);
  });
}

TEST(Lora, ReadsPeftAdaptersOfTheGoldenModel) {
  for (const std::string name : {"peft-lora", "peft-rslora-patterns", "peft-dora"}) {
    auto model = load_llama(golden_path("checkpoints/dense-bf16"));
    load_lora_adapter(*model, golden_path("checkpoints/" + name));
    const auto expected =
        golden_tensor("vectors/" + name + "_logits.safetensors", "adapter_logits");
    const auto logits = model->forward(golden_ids())[0];
    EXPECT_LE(relative(logits, expected), 2e-6) << name;
  }
}

// ------------------------------------------------------------------ DoRA

/// m / |W + s B A| (W + s B A), with a dense W, in double.
torch::Tensor dora_weight(const torch::Tensor& w, const LoraImpl& adapter) {
  const auto sum = w.to(torch::kDouble) + adapter.delta().detach().to(torch::kDouble);
  const auto norm = sum.norm(2, {1}, /*keepdim=*/true);
  return adapter.magnitude.detach().to(torch::kDouble).unsqueeze(1) * sum / norm;
}

TEST(Dora, ForwardIsTheProductWithTheScaledRows) {
  torch::manual_seed(1);
  for (const bool packed : {true, false}) {
    Linear layer(96, 32);
    if (packed) {
      layer->set_quantized(
          QuantizedLinear(quantize(layer->weight, nf4_options(64, true)), layer->bias));
    }
    const auto w = layer->dense_weight();
    Lora adapter(96, 32, 4, 2.0, 0.0);
    adapter->set_magnitude(layer->weight_norm(*adapter));
    layer->set_lora(adapter);
    const auto x = torch::randn({2, 5, 96});
    const auto plain = torch::linear(x, w, layer->current_bias());
    EXPECT_LE(relative(layer->forward(x), plain), 1e-6) << "a new adapter changes something";
    {
      const torch::NoGradGuard no_grad;
      adapter->B.normal_(0, 0.1);
      adapter->magnitude.add_(torch::rand({32}));
    }
    const auto bias = layer->current_bias().to(torch::kDouble);
    const auto expected = torch::linear(x.to(torch::kDouble), dora_weight(w, *adapter), bias);
    EXPECT_LE(relative(layer->forward(x), expected), 1e-6);
    EXPECT_GT(relative(plain, expected), 1e-2);
  }
}

TEST(Dora, NormsComeFromCodesAndFollowTheWeight) {
  torch::manual_seed(2);
  for (const QuantizeOptions& options : {hqq_options(4, 64), nf4_options(64, true)}) {
    Linear layer(192, 48, false);
    layer->set_quantized(QuantizedLinear(quantize(layer->weight, options)));
    Lora adapter(192, 48, 4, 1.5, 0.0);
    {
      const torch::NoGradGuard no_grad;
      adapter->B.normal_();
    }
    const auto norms = [&] {
      return (layer->dense_weight() + adapter->delta().detach()).norm(2, {1});
    };
    EXPECT_LE(relative(layer->weight_norm(*adapter), norms()), 1e-6);
    layer->packed->quantize_weights(layer->dense_weight() * 2);  // a cached norm would be stale
    EXPECT_LE(relative(layer->weight_norm(*adapter), norms()), 1e-6);
  }
}

TEST(Dora, GradientsEqualThoseOfTheDenseFormula) {
  torch::manual_seed(3);
  Linear layer(64, 32);
  layer->set_quantized(QuantizedLinear(quantize(layer->weight, hqq_options(8, 64)), layer->bias));
  Lora adapter(64, 32, 4, 2.0, 0.0);
  adapter->set_magnitude(layer->weight_norm(*adapter));
  layer->set_lora(adapter);
  {
    const torch::NoGradGuard no_grad;
    adapter->B.normal_(0, 0.1);
  }
  const auto seed = torch::randn({5, 32});
  auto x = torch::randn({5, 64}).requires_grad_();
  layer->forward(x).backward(seed);
  // The same with a dense W; the norm is a constant, as in the paper (4.3).
  const auto w = layer->dense_weight();
  auto xd = x.detach().clone().requires_grad_();
  auto a = adapter->A.detach().clone().requires_grad_();
  auto b = adapter->B.detach().clone().requires_grad_();
  auto m = adapter->magnitude.detach().clone().requires_grad_();
  const auto norm = layer->weight_norm(*adapter);
  const auto whole = (m / norm).unsqueeze(1) * (w + 2 * torch::matmul(b, a));
  torch::matmul(xd, whole.t()).backward(seed);
  EXPECT_LE(relative(x.grad(), xd.grad()), 5e-6);
  EXPECT_LE(relative(adapter->A.grad(), a.grad()), 5e-6);
  EXPECT_LE(relative(adapter->B.grad(), b.grad()), 5e-6);
  EXPECT_LE(relative(adapter->magnitude.grad(), m.grad()), 5e-6);
}

TEST(Dora, SavedFolderLoadsWithEqualLogits) {
  const TempFolder folder("dora");
  auto model = quantized_llama(6);
  EXPECT_EQ(add_lora(*model, small_lora(true)), 4);
  EXPECT_EQ(lora_parameters(*model).size(), 12u);
  randomize(*model);
  const auto expected = model->forward(ids()).detach();
  save_lora_adapter(*model, small_lora(true), folder.file("adapter"));
  auto other = quantized_llama(6);
  EXPECT_TRUE(load_lora_adapter(*other, folder.file("adapter")).use_dora);
  EXPECT_TRUE(torch::equal(other->forward(ids()), expected));
}

// ------------------------------------------------------------------ several adapters

TEST(Adapters, FirstIsActiveOthersWait) {
  auto model = quantized_llama(7);
  const auto base = model->forward(ids()).detach();
  add_lora(*model, small_lora(), "one");
  add_lora(*model, small_lora(true), "two");
  randomize(*model, "one");
  randomize(*model, "two");
  EXPECT_EQ(adapter_names(*model), (std::vector<std::string>{"one", "two"}));
  EXPECT_EQ(active_adapters(*model), std::vector<std::string>{"one"});
  const auto one = model->forward(ids()).detach();
  set_adapter(*model, {"two"});
  for (const auto& p : model->named_parameters()) {
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".lora_two.") != std::string::npos);
  }
  const auto two = model->forward(ids()).detach();
  EXPECT_FALSE(torch::equal(one, two));
  set_adapter(*model, {"one", "two"}, /*inference_mode=*/true);
  EXPECT_TRUE(model->parameters()[0].requires_grad() == false);
  EXPECT_FALSE(torch::equal(model->forward(ids()), one));
  set_adapter(*model, {"one"});
  EXPECT_TRUE(torch::equal(model->forward(ids()), one));
  delete_adapter(*model, "one");
  EXPECT_TRUE(torch::equal(model->forward(ids()), base)) << "no active adapter is left";
  EXPECT_EQ(adapter_names(*model), std::vector<std::string>{"two"});
}

TEST(Adapters, SumsOfTwo) {
  Linear layer(64, 32, false);
  const auto weight = layer->weight.detach().clone();
  for (const std::string name : {"a", "b"}) {
    Lora adapter(64, 32, 4, 0.5, 0.0);
    const torch::NoGradGuard no_grad;
    adapter->B.normal_();
    layer->set_lora(adapter, name);
  }
  layer->set_active({"a", "b"});
  const auto x = torch::randn({3, 64});
  const auto sum = weight + layer->lora("a")->delta() + layer->lora("b")->delta();
  EXPECT_LE(relative(layer->forward(x), torch::linear(x, sum)), 1e-6);
}

TEST(Adapters, FoldersByName) {
  const TempFolder folder("names");
  auto model = quantized_llama(8);
  add_lora(*model, small_lora(), "one");
  add_lora(*model, small_lora(true), "two");
  set_adapter(*model, {"one", "two"});
  randomize(*model);
  const auto expected = model->forward(ids()).detach();
  save_lora_adapter(*model, small_lora(), folder.file("one"), "one");
  save_lora_adapter(*model, small_lora(true), folder.file("two"), "two");
  auto other = quantized_llama(8);
  load_lora_adapter(*other, folder.file("one"), false, "one");
  load_lora_adapter(*other, folder.file("two"), false, "two");
  EXPECT_EQ(active_adapters(*other), std::vector<std::string>{"one"});
  set_adapter(*other, {"one", "two"}, true);
  EXPECT_TRUE(torch::equal(other->forward(ids()), expected));
}

TEST(Adapters, MistakesAreTyped) {
  auto model = quantized_llama(9);
  const TempFolder folder("mistakes");
  expect_error(Errc::kConfig, "expected add_lora first",
               [&] { save_lora_adapter(*model, small_lora(), folder.file("x")); });
  add_lora(*model, small_lora(), "one");
  expect_error(Errc::kConfig, "adapter is 'other', expected one of one",
               [&] { set_adapter(*model, {"other"}); });
  expect_error(Errc::kConfig, "which the model has already",
               [&] { add_lora(*model, small_lora(), "one"); });
  expect_error(Errc::kConfig, "expected one without dots",
               [&] { add_lora(*model, small_lora(), "a.b"); });
  merge_adapter(*model);
  expect_error(Errc::kConfig, "is merged into layer", [&] { delete_adapter(*model, "one"); });
}

}  // namespace
}  // namespace quantal::testing

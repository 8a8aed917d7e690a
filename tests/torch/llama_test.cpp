// The Llama model: logits of the golden checkpoints, cache, checkpointing, training.
#include "torch/llama_model.h"
#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

torch::Tensor golden_logits(const std::string& name) {
  return golden_tensor("vectors/checkpoint_logits.safetensors", name);
}

TEST(Llama, LogitsEqualTransformers) {
  for (const std::string name : {"dense-bf16", "dense-bf16-sharded"}) {
    auto model = load_llama(golden_path("checkpoints/" + name));
    EXPECT_LE(relative(model->forward(golden_ids())[0], golden_logits(name)), 2e-6) << name;
  }
}

TEST(Llama, LogitsOfGgufFilesEqualTransformers) {
  for (const std::string type : {"f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"}) {
    const std::string name = "gguf/tiny-" + type + ".gguf";
    auto model = load_llama(golden_path("checkpoints/" + name));
    EXPECT_LE(relative(model->forward(golden_ids())[0], golden_logits(name)), 2e-6) << name;
  }
}

TEST(Llama, LoadsUpstreamQuantizedFolders) {
  for (const std::string name : {"bnb-nf4", "bnb-nf4-double", "hqq-safetensors"}) {
    auto model = load_llama(golden_path("checkpoints/dense-bf16"));
    auto config = hqq_config();
    auto adapter = create_quantization_adapter(Backend::CPU, config);
    adapter->load_quantized_model(golden_path("checkpoints/" + name), *model);
    EXPECT_TRUE(named_linears(*model)[0].second->is_quantized()) << name;
    model->to(torch::kFloat);
    EXPECT_LE(relative(model->forward(golden_ids())[0], golden_logits(name)), 5e-6) << name;
  }
}

TEST(Llama, CacheStepsEqualTheWholeSequence) {
  auto model = tiny_llama(7);
  const torch::NoGradGuard no_grad;
  const auto ids = torch::randint(0, 96, {2, 12}, torch::kLong);
  const auto whole = model->forward(ids);
  KvCache cache = model->make_cache(2, 12);
  EXPECT_LE(relative(model->step(ids.narrow(1, 0, 5), cache), whole.select(1, 4)), 1e-5);
  EXPECT_LE(relative(model->step(ids.narrow(1, 5, 4), cache), whole.select(1, 8)), 1e-5);
  for (std::int64_t i = 9; i < 12; ++i) {
    EXPECT_LE(relative(model->step(ids.narrow(1, i, 1), cache), whole.select(1, i)), 1e-5);
  }
  expect_error(Errc::kShape, "cache holds 12", [&] { model->step(ids.narrow(1, 0, 1), cache); });
}

TEST(Llama, LogitsAreTheSameWithAndWithoutGradients) {
  const auto ids = torch::randint(0, 96, {2, 12}, torch::kLong);
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    auto model = tiny_llama(7);
    model->to(dtype);
    const auto recorded = model->forward(ids);
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(torch::equal(model->forward(ids), recorded));
  }
}

TEST(Llama, StepsOfFewTokensHaveTheBitsOfOnesThatRecord) {
  // Few positions without gradients are rotated in one pass. Nothing asks for a gradient: attention
  // may have other kernels where it has to give one.
  auto model = tiny_llama(7);
  model->to(torch::kBFloat16);
  for (auto& parameter : model->parameters()) parameter.requires_grad_(false);
  const auto ids = torch::randint(0, 96, {2, 12}, torch::kLong);
  const auto last = [&] {
    KvCache cache = model->make_cache(2, 12);
    model->step(ids.narrow(1, 0, 8), cache);
    model->step(ids.narrow(1, 8, 3), cache);
    return model->step(ids.narrow(1, 11, 1), cache);
  };
  const torch::NoGradGuard no_grad;
  const auto expected = [&] {
    const torch::AutoGradMode record(true);
    return last().detach();
  }();
  EXPECT_TRUE(torch::equal(last(), expected));
}

TEST(Llama, NormHasTheGradientsOfItsFormula) {
  torch::manual_seed(3);
  for (const auto& [dtype, bound] : {std::pair(torch::kFloat, 1e-6), {torch::kBFloat16, 1e-2}}) {
    RmsNorm norm(37, 1e-5, dtype);
    {
      const torch::NoGradGuard no_grad;
      norm->weight.copy_(torch::randn({37}));
    }
    const auto x = torch::randn({2, 5, 37}).to(dtype).requires_grad_();
    const auto weight = norm->weight.detach().clone().requires_grad_();
    const auto same_x = x.detach().clone().requires_grad_();
    const auto wide = same_x.to(torch::kFloat);
    const auto n = wide * torch::rsqrt(wide.square().mean(-1, true) + 1e-5);
    const auto expected = (weight * n.to(dtype)).to(dtype);
    const auto y = norm->forward(x);
    EXPECT_LE(relative(y.detach(), expected.detach()), bound);
    const auto grad = torch::randn({2, 5, 37}).to(dtype);
    y.backward(grad);
    expected.backward(grad);
    EXPECT_LE(relative(x.grad(), same_x.grad()), bound);
    EXPECT_LE(relative(norm->weight.grad(), weight.grad()), bound);
  }
}

TEST(Llama, GreedyGenerationEqualsArgmaxOfTheWholeSequence) {
  auto model = tiny_llama(8);
  const torch::NoGradGuard no_grad;
  auto ids = torch::arange(6);
  GenerateOptions options;
  options.max_new_tokens = 5;
  const auto fresh = model->generate(ids, options);
  ASSERT_EQ(fresh.size(), 5u);
  for (const std::int64_t token : fresh) {
    EXPECT_EQ(model->forward(ids.unsqueeze(0))[0][-1].argmax().item<std::int64_t>(), token);
    ids = torch::cat({ids, torch::tensor({token})});
  }
  options.temperature = 0.8;
  options.seed = 5;
  EXPECT_EQ(model->generate(ids, options), model->generate(ids, options));
}

TEST(Llama, PerplexityIsTheMeanOverPredictedTokens) {
  auto model = tiny_llama(9);
  const torch::NoGradGuard no_grad;
  const auto ids = torch::randint(0, 96, {5, 16}, torch::kLong);
  const auto logits = torch::log_softmax(model->forward(ids).to(torch::kDouble), -1);
  const auto picked = logits.slice(1, 0, -1).gather(-1, ids.slice(1, 1).unsqueeze(-1));
  const double expected = std::exp(-picked.mean().item<double>());
  EXPECT_NEAR(model->perplexity(ids), expected, 1e-5 * expected);
  EXPECT_NEAR(std::exp(model->loss(ids).item<double>()), expected, 1e-5 * expected);
  expect_error(Errc::kShape, "expected [n >= 1, length >= 2]", [&] { model->perplexity(ids[0]); });
  expect_error(Errc::kShape, "expected 0 .. 95", [&] {
    model->forward(torch::full({1, 3}, 96, torch::kLong));
  });
}

/// Gradients of all adapters after one backward pass.
std::vector<torch::Tensor> lora_gradients(bool checkpointing, double dropout) {
  auto model = tiny_llama(10);
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  adapter->prepare_model_for_training(*model);
  LoraConfig config;
  config.r = 4;
  config.lora_dropout = dropout;
  torch::manual_seed(11);
  add_lora(*model, config);
  for (auto& p : lora_parameters(*model)) {
    const torch::NoGradGuard no_grad;
    p.normal_(0, 0.1);
  }
  model->set_gradient_checkpointing(checkpointing);
  torch::manual_seed(12);
  model->loss(torch::arange(40).view({2, 20})).backward();
  std::vector<torch::Tensor> out;
  for (const auto& p : lora_parameters(*model)) out.push_back(p.grad().clone());
  return out;
}

TEST(Llama, CheckpointingGivesTheSameGradients) {
  for (const double dropout : {0.0, 0.3}) {
    const auto plain = lora_gradients(false, dropout), recomputed = lora_gradients(true, dropout);
    ASSERT_EQ(plain.size(), 8u);
    for (std::size_t i = 0; i < plain.size(); ++i) {
      EXPECT_GT(plain[i].abs().max().item<double>(), 0);
      EXPECT_LE(relative(recomputed[i], plain[i]), 1e-6) << "dropout " << dropout;
    }
  }
}

TEST(Llama, TrainingReducesTheLoss) {
  auto model = tiny_llama(13);
  {
    // The tied, frozen embedding bounds how sure the model can become: log(96) - 1.3 at its scale.
    const torch::NoGradGuard no_grad;
    model->named_parameters()["model.embed_tokens.weight"].mul_(20);
  }
  auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  adapter->quantize_model(*model);
  adapter->prepare_model_for_training(*model);
  LoraConfig config;
  config.r = 8;
  config.lora_alpha = 16;
  config.target_modules = {"all-linear"};
  EXPECT_EQ(add_lora(*model, config), 14);
  model->set_gradient_checkpointing(true);
  torch::optim::AdamW optimizer(lora_parameters(*model), torch::optim::AdamWOptions(1e-2));
  const auto ids = torch::arange(48).view({2, 24});
  const double first = model->loss(ids).item<double>();
  double last = first;
  for (int i = 0; i < 40; ++i) {
    optimizer.zero_grad();
    auto loss = model->loss(ids);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.7 * first);
}

TEST(LlamaConfig, RefusesWhatItCannotCompute) {
  const auto with = [](const std::string& extra) {
    return R"({"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
               "num_attention_heads": 2)" +
           extra + "}";
  };
  EXPECT_EQ(LlamaConfig::from_json(with("")).head_dim, 4);
  expect_error(Errc::kUnsupported, "model_type is gpt2",
               [&] { LlamaConfig::from_json(with(R"(, "model_type": "gpt2")")); });
  expect_error(Errc::kUnsupported, "rope_scaling is of type yarn",
               [&] { LlamaConfig::from_json(with(R"(, "rope_scaling": {"rope_type": "yarn"})")); });
  expect_error(Errc::kConfig, "num_key_value_heads",
               [&] { LlamaConfig::from_json(with(R"(, "num_key_value_heads": 3)")); });
  expect_error(Errc::kConfig, "vocab_size is missing", [] { LlamaConfig::from_json("{}"); });
  expect_error(Errc::kConfig, "llama config", [] { LlamaConfig::from_json("{"); });
}

}  // namespace
}  // namespace quantal::testing

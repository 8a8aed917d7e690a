// Adapters of one's own: by name in configs, the factory and files.
#include <nlohmann/json.hpp>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

/// W rounded to multiples of a step that the config's bits decide: something to see overrides by.
class StepLinear : public QuantizedLayerImpl {
 public:
  StepLinear(std::int64_t in, std::int64_t out, bool with_bias, const QuantizationConfig& config)
      : QuantizedLayerImpl("StepLinear", in, out), bits(config.bits) {
    steps_ = register_buffer("steps", torch::zeros({out, in}));
    size_ = register_buffer("size", torch::ones({1}) / (1 << bits));
    if (with_bias) set_bias(torch::zeros({out}));
  }
  torch::Tensor forward(const torch::Tensor& x) override {
    return torch::linear(x, dequantize_weights(), bias);
  }
  void quantize_weights(const torch::Tensor& weights) override {
    steps_.copy_((weights.to(torch::kFloat) / size_).round());
  }
  torch::Tensor dequantize_weights() const override { return steps_ * size_; }

  int bits;

 private:
  torch::Tensor steps_, size_;
};

class StepAdapter : public QuantizationAdapter {
 public:
  using QuantizationAdapter::QuantizationAdapter;
  void validate_backend_support() const override {
    if (backend() == Backend::MLX) fail(Errc::kUnsupported, "StepAdapter: not on MLX");
  }
  Linear create_quantized_linear(std::int64_t in, std::int64_t out, bool bias) override {
    return Linear(std::make_shared<StepLinear>(in, out, bias, config()));
  }
  void quantize_model(torch::nn::Module& model) override {
    replace_linear_with_quantized(model, *this);
  }
};
class OtherAdapter final : public StepAdapter {
 public:
  using StepAdapter::StepAdapter;
};

struct Net : torch::nn::Module {
  Net() {
    up = register_module("up", Linear(64, 96));
    mid = register_module("mid", Linear(96, 96, false));
    down = register_module("down", Linear(96, 64));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return down->forward(mid->forward(torch::relu(up->forward(x))));
  }
  Linear up{nullptr}, mid{nullptr}, down{nullptr};
};

QuantizationConfig step_config() {
  return config_from_json(R"({"method": "step", "bits": 6, "skip_modules": ["down"],
                              "layer_configs": {"mid": {"bits": 3}}})");
}

class CustomAdapter : public ::testing::Test {
 protected:
  void SetUp() override { register_adapter<StepAdapter>("step"); }
};

TEST_F(CustomAdapter, ConfigAndFactoryKnowTheName) {
  EXPECT_EQ(step_config().custom_method, "step");
  auto adapter = create_quantization_adapter(Backend::MPS, step_config());
  EXPECT_NE(dynamic_cast<StepAdapter*>(adapter.get()), nullptr);
  EXPECT_EQ(adapter->registered_name(), "step");
  EXPECT_TRUE(adapter->warnings().empty());
  EXPECT_EQ(StepAdapter(Backend::CPU, {}).registered_name(), "step") << "by its class";
  EXPECT_EQ(OtherAdapter(Backend::CPU, {}).registered_name(), "");
  expect_error(Errc::kUnsupported, "not on MLX",
               [] { create_quantization_adapter(Backend::MLX, step_config()); });
}

TEST_F(CustomAdapter, QuantizesWhatTheConfigLeaves) {
  auto net = std::make_shared<Net>();
  const auto weight = net->up->weight.detach().clone(), bias = net->up->bias.detach().clone();
  auto adapter = create_quantization_adapter(Backend::CPU, step_config());
  adapter->quantize_model(*net);
  const auto up = std::dynamic_pointer_cast<StepLinear>(net->up->custom);
  const auto mid = std::dynamic_pointer_cast<StepLinear>(net->mid->custom);
  ASSERT_TRUE(up && mid);
  EXPECT_EQ(up->bits, 6);
  EXPECT_EQ(mid->bits, 3) << "layer_configs do not reach the layer";
  EXPECT_FALSE(net->down->is_quantized());
  EXPECT_TRUE(torch::equal(up->bias, bias));
  EXPECT_FALSE(mid->bias.defined());
  EXPECT_LE((up->dequantize_weights() - weight).abs().max().item<double>(), 0.5 / 64);
  const auto& entry = adapter->report().entries.at(0);
  EXPECT_EQ(entry.method, "StepLinear");
  EXPECT_NEAR(entry.relative_error, relative(up->dequantize_weights(), weight), 1e-9);
  EXPECT_EQ(adapter->config().bits, 6) << "the config of a layer stays behind";
}

TEST_F(CustomAdapter, BuiltInMethodsInLayerConfigsAreQuantals) {
  auto config = step_config();
  config.layer_configs = {{"mid", {.method = QuantizationMethod::HQQ, .bits = 4}}};
  auto net = std::make_shared<Net>();
  create_quantization_adapter(Backend::CPU, config)->quantize_model(*net);
  ASSERT_TRUE(net->mid->packed);
  EXPECT_EQ(net->mid->packed->spec().bits, 4);
  EXPECT_TRUE(net->up->custom);
}

TEST_F(CustomAdapter, FilesRememberTheAdapter) {
  const TempFolder folder("custom");
  auto net = std::make_shared<Net>();
  auto adapter = create_quantization_adapter(Backend::CPU, step_config());
  adapter->quantize_model(*net);
  adapter->save_quantized_model(*net, folder.file("model"), R"({"model_type": "net"})");
  const auto config = nlohmann::json::parse(read_text_file(folder.file("model/config.json")));
  EXPECT_EQ(config["quantal_adapter"]["name"], "step");
  EXPECT_EQ(config["quantal_adapter"]["backend"], "cpu");
  EXPECT_EQ(config["quantal_adapter"]["config"]["bits"], 6);
  EXPECT_EQ(config["model_type"], "net");

  const auto x = torch::randn({3, 64});
  for (const bool own : {true, false}) {  // what was saved wins over who loads
    auto loader = own ? create_quantization_adapter(Backend::CPU, step_config())
                      : create_quantization_adapter(Backend::CPU, hqq_config());
    auto loaded = std::make_shared<Net>();
    const auto found = loader->load_quantized_model(folder.file("model"), *loaded);
    EXPECT_TRUE(found.report.fits()) << found.report.text();
    EXPECT_EQ(std::dynamic_pointer_cast<StepLinear>(loaded->mid->custom)->bits, 3);
    EXPECT_TRUE(torch::equal(loaded->forward(x), net->forward(x)));
  }
  // Saved again by another adapter, the folder is that one's.
  auto plain = create_quantization_adapter(Backend::CPU, hqq_config());
  plain->save_quantized_model(*std::make_shared<Net>(), folder.file("plain"), config.dump());
  EXPECT_FALSE(nlohmann::json::parse(read_text_file(folder.file("plain/config.json")))
                   .contains("quantal_adapter"));
}

TEST_F(CustomAdapter, FilesOfUnknownAdaptersAreRefusedByName) {
  const TempFolder folder("unknown");
  auto net = std::make_shared<Net>();
  auto adapter = create_quantization_adapter(Backend::CPU, step_config());
  adapter->quantize_model(*net);
  adapter->save_quantized_model(*net, folder.file("model"));
  auto text = read_text_file(folder.file("model/config.json"));
  text.replace(text.find("\"step\""), 6, "\"gone\"");
  write_file_atomic(folder.file("model/config.json"),
                    {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  auto loaded = std::make_shared<Net>();
  auto plain = create_quantization_adapter(Backend::CPU, hqq_config());
  expect_error(Errc::kUnsupported, "the adapter 'gone' wrote this model and is not registered here",
               [&] { plain->load_quantized_model(folder.file("model"), *loaded); });
  EXPECT_FALSE(loaded->up->is_quantized());
  // An adapter of one's own reads it with its own layers.
  adapter->load_quantized_model(folder.file("model"), *loaded);
  EXPECT_TRUE(loaded->up->custom);
}

TEST_F(CustomAdapter, AdaptersTrainAndMergeOnSuchLayers) {
  torch::manual_seed(4);
  auto net = std::make_shared<Net>();
  auto config = step_config();
  config.bits = 8;
  config.layer_configs.clear();
  auto adapter = create_quantization_adapter(Backend::CPU, config);
  adapter->quantize_model(*net);
  adapter->prepare_model_for_training(*net);
  LoraConfig lora;
  lora.target_modules = {"up", "mid"};
  lora.use_dora = true;
  EXPECT_EQ(add_lora(*net, lora), 2);
  const auto x = torch::randn({3, 64});
  net->forward(x).sum().backward();
  EXPECT_GT(net->up->lora()->B.grad().abs().sum().item<double>(), 0);
  const torch::NoGradGuard no_grad;
  for (auto& p : lora_parameters(*net)) p.add_(torch::randn_like(p) * 0.1);
  const auto expected = net->forward(x);
  const auto before = net->up->custom->dequantize_weights();
  merge_adapter(*net);
  EXPECT_LE(relative(net->forward(x), expected), 0.1);
  EXPECT_EQ(merge_report(*net).layers.size(), 2u);
  unmerge_adapter(*net);
  EXPECT_TRUE(torch::equal(net->up->custom->dequantize_weights(), before));
  EXPECT_TRUE(torch::equal(net->forward(x), expected));
}

TEST_F(CustomAdapter, NamesAreChecked) {
  register_adapter<StepAdapter>("step");  // the same class again
  expect_error(Errc::kConfig, "register_adapter: name is 'step', which another adapter has",
               [] { register_adapter<OtherAdapter>("step"); });
  expect_error(Errc::kConfig, "register_adapter: name is 'hqq', which is a built-in method",
               [] { register_adapter<StepAdapter>("hqq"); });
  expect_error(Errc::kConfig, "register_adapter: name is 'My Method', expected lower-case letters",
               [] { register_adapter<StepAdapter>("My Method"); });
  expect_error(Errc::kConfig, "factory is empty", [] { register_adapter("x", nullptr); });
  register_custom_method("nameless");
  QuantizationConfig config;
  config.method = QuantizationMethod::NONE;
  config.custom_method = "nameless";
  expect_error(Errc::kUnsupported, "nameless has no C++ adapter, expected one of BitsAndBytes",
               [&] { create_quantization_adapter(Backend::CPU, config); });
  register_adapter("by_function", [](Backend backend, const QuantizationConfig& c) {
    return std::make_unique<OtherAdapter>(backend, c);
  });
  config.custom_method = "by_function";
  EXPECT_EQ(create_quantization_adapter(Backend::CPU, config)->registered_name(), "by_function");
}

}  // namespace
}  // namespace quantal::testing

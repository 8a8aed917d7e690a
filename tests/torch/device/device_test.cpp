// The whole flow on a device that is not the CPU and has no kernels (test_device.cpp): dispatch,
// layers, gradients, adapters, merging, saving; and that nothing on the way waits for the host.
#include <ATen/core/dispatch/Dispatcher.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "torch/torch_support.h"

namespace quantal::testing {
namespace {

using Ints = std::vector<std::int64_t>;
using OptionalTensor = std::optional<at::Tensor>;
using T = const at::Tensor&;

template <class Result>
Result ask(const char* question) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("quantal_test_device::") + question).c_str(), "")
      .typed<Result()>()
      .call();
}

class OnDevice : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(3); }

  const torch::Device device_{torch::kPrivateUse1, 0};

  PackedTensors there(const PackedTensors& w) const {
    return {w.spec, w.codes.to(device_), w.stats.to(device_), w.shared.to(device_)};
  }
  static std::vector<QuantizeOptions> forms() {
    return {hqq_options(4, 64), hqq_options(3, 64), hqq_options(4, 64, 0), nf4_options(64, true),
            nf4_options(64, false)};
  }
};

TEST_F(OnDevice, ValuesAndBytesAreTheCpus) {
  const auto weight = torch::randn({48, 192}) * 0.1;
  for (const auto& options : forms()) {
    const PackedTensors w = quantize(weight, options), far = quantize(weight.to(device_), options);
    EXPECT_EQ(far.codes.device(), device_);
    EXPECT_TRUE(far.codes.cpu().equal(w.codes) && far.stats.cpu().equal(w.stats) &&
                far.shared.cpu().equal(w.shared));
    for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      const auto dense = dequantize(far, type);
      EXPECT_EQ(dense.device(), device_);
      EXPECT_TRUE(dense.cpu().equal(dequantize(w, type)));
    }
    EXPECT_NEAR(relative_error(weight.to(device_), far), relative_error(weight, w), 1e-12);
  }
}

TEST_F(OnDevice, ProductsAndGradients) {
  for (const auto& options : forms()) {
    const PackedTensors w = quantize(torch::randn({48, 192}) * 0.1, options), far = there(w);
    const auto x = torch::randn({5, 192}, torch::requires_grad()), g = torch::randn({5, 48});
    const auto bias = torch::randn({48}, torch::requires_grad());
    linear(x, w, bias).backward(g);
    const auto x_far = x.detach().to(device_).requires_grad_();
    const auto bias_far = bias.detach().to(device_).requires_grad_();
    const auto y = linear(x_far, far, bias_far);
    EXPECT_LE(relative(y.cpu(), linear(x, w, bias)), 1e-6);
    y.backward(g.to(device_));
    EXPECT_LE(relative(x_far.grad().cpu(), x.grad()), 1e-6);
    EXPECT_LE(relative(bias_far.grad().cpu(), bias.grad()), 1e-6);
  }
}

TEST_F(OnDevice, NothingWaitsForTheHost) {
  QuantizeOptions int8;
  int8.method = QuantizationMethod::BNB_INT8;
  int8.bits = 8;
  std::vector<QuantizeOptions> all = forms();
  all.push_back(int8);
  for (const auto& options : all) {
    const PackedTensors far = there(quantize(torch::randn({48, 192}), options));
    const auto x = torch::randn({5, 192}).to(device_).requires_grad_();
    const auto g = torch::randn({5, 48}).to(device_), bias = torch::randn({48}).to(device_);
    ask<std::int64_t>("transfers");
    linear(x, far, bias).backward(g);
    dequantize(far, torch::kHalf);
    row_square_sums(far, torch::kDouble);
    if (options.method == QuantizationMethod::BNB_INT8) linear_int8(x, far, bias, 6.0);
    if (int8_activations_refusal(far.spec).empty()) linear_int8_activations(x, far, bias);
    EXPECT_EQ(ask<std::int64_t>("transfers"), 0) << describe_options(options);
  }
}

TEST_F(OnDevice, WeightsAreDecodedInPanels) {
  const PackedTensors far = there(quantize(torch::randn({2048, 1024}), nf4_options(64, true)));
  const auto x = torch::randn({2, 1024}).to(device_);
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("quantal_aten_test::product", "")
                      .typed<at::Tensor(T, T, T, T, const OptionalTensor&, at::IntArrayRef,
                                        std::int64_t, std::int64_t, bool)>();
  const auto spec = spec_to_ints(far.spec);
  constexpr std::int64_t kBlock = 64 << 10, kPanel = 1 << 20;
  ask<std::int64_t>("peak_bytes");
  op.call(x, far.codes, far.stats, far.shared, std::nullopt, Ints(spec.begin(), spec.end()), kBlock,
          kPanel, false);
  // 8 MiB of values in all; the panel, and a block's codes, index, values and their rounding
  EXPECT_LE(ask<std::int64_t>("peak_bytes"), kPanel + 20 * kBlock);
}

// libtorch's Module::to knows no PrivateUse1, so layers are made where they stay.
TEST_F(OnDevice, LayersComputeAndQuantizeAgain) {
  const PackedTensors w = quantize(torch::randn({48, 192}), hqq_options(4, 64));
  const auto bias = torch::randn({48});
  QuantizedLinear near(w, bias), far(there(w), bias.to(device_).requires_grad_());
  const auto x = torch::randn({5, 192});
  const auto y = far->forward(x.to(device_));
  EXPECT_LE(relative(y.cpu(), near->forward(x)), 1e-6);
  y.sum().backward();
  EXPECT_LE(relative(far->bias.grad().cpu(), torch::full({48}, 5.0)), 1e-6);
  EXPECT_TRUE(far->weight().cpu().equal(near->weight()));
  EXPECT_LE(
      relative(row_square_sums(far->packed(), torch::kFloat).cpu(), near->weight().square().sum(1)),
      1e-6);
  const auto weight = torch::randn({48, 192});
  far->quantize_weights(weight.to(device_));
  near->quantize_weights(weight);
  EXPECT_EQ(far->codes.device(), device_);
  EXPECT_TRUE(far->codes.cpu().equal(near->codes));
}

TEST_F(OnDevice, AdaptersTrainAndMerge) {
  for (const bool dora : {false, true}) {
    const PackedTensors w = quantize(torch::randn({48, 192}), hqq_options(4, 64));
    const auto x = torch::randn({5, 192});
    std::vector<at::Tensor> outputs, grads, codes;
    for (const bool on_device : {false, true}) {
      const torch::Device place = on_device ? device_ : torch::Device(torch::kCPU);
      torch::nn::Sequential model{Linear(QuantizedLinear(on_device ? there(w) : w))};
      LoraConfig config;
      config.r = 4;
      config.target_modules = {"0"};
      config.use_dora = dora;
      torch::manual_seed(6);
      EXPECT_EQ(add_lora(*model, config), 1);
      const auto layer = named_linears(*model).front().second;
      EXPECT_EQ(layer->lora()->A.device(), place);
      {
        const torch::NoGradGuard no_grad;
        layer->lora()->B.copy_(torch::linspace(-0.1, 0.2, 48 * 4).view({48, 4}));
      }
      const auto y = layer->forward(x.to(place));
      y.sum().backward();
      outputs.push_back(y.detach().cpu());
      grads.push_back(layer->lora()->A.grad().cpu());
      merge_adapter(*model);
      codes.push_back(layer->packed->codes.cpu());
      EXPECT_LE(relative(layer->forward(x.to(place)).cpu(), outputs.back()), 0.2);
      unmerge_adapter(*model);
      EXPECT_TRUE(layer->packed->codes.cpu().equal(w.codes));
    }
    EXPECT_LE(relative(outputs[1], outputs[0]), 1e-5);
    EXPECT_LE(relative(grads[1], grads[0]), 1e-4);
    EXPECT_GT(codes[1].eq(codes[0]).to(torch::kFloat).mean().item<float>(), 0.95);
  }
}

TEST_F(OnDevice, EmbeddingsGatherRows) {
  const PackedTensors w = quantize(torch::randn({48, 192}), hqq_options(4, 64));
  Embedding near(48, 192), far(48, 192);
  near->set_quantized(QuantizedLinear(w));
  far->set_quantized(QuantizedLinear(there(w)));
  const auto ids = torch::tensor({7, 0, 47, 7}).view({2, 2});
  EXPECT_TRUE(far->forward(ids.to(device_)).cpu().equal(near->forward(ids)));
}

TEST_F(OnDevice, ModelsAreSavedFromThere) {
  const auto adapter = create_quantization_adapter(Backend::CPU, hqq_config());
  Llama model = tiny_llama();
  adapter->quantize_model(*model);
  const TempFolder near("near"), far("far");
  adapter->save_quantized_model(*model, near.file("model"), "{}");
  for (const auto& [name, layer] : named_linears(*model)) {
    if (layer->packed) layer->set_quantized(QuantizedLinear(there(layer->packed->packed())));
  }
  adapter->save_quantized_model(*model, far.file("model"), "{}");
  for (const auto& entry : std::filesystem::directory_iterator(near.file("model"))) {
    const std::string name = entry.path().filename().string();
    const auto bytes = [](const std::string& path) {
      std::ifstream file(path, std::ios::binary);
      return std::string(std::istreambuf_iterator<char>(file), {});
    };
    EXPECT_EQ(bytes(far.file("model/" + name)), bytes(entry.path().string())) << name;
  }
}

TEST_F(OnDevice, OutOfMemoryIsSaidAndLeaksNothing) {
  const PackedTensors far = there(quantize(torch::randn({512, 1024}), nf4_options(64, true)));
  const auto x = torch::randn({2, 1024}).to(device_);
  const auto limit = [](std::int64_t bytes) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow("quantal_test_device::limit", "")
        .typed<std::int64_t(std::int64_t)>()
        .call(bytes);
  };
  const std::int64_t held = limit(std::int64_t{1} << 20);
  EXPECT_THROW(linear(x, far), std::exception);
  EXPECT_EQ(limit(std::int64_t{1} << 40), held);
  EXPECT_EQ(linear(x, far).sizes(), (torch::IntArrayRef{2, 512}));
}

TEST_F(OnDevice, OneDeviceForAll) {
  const PackedTensors w = quantize(torch::randn({48, 192}), hqq_options(4, 64)), far = there(w);
  const auto refusal = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::exception& error) {
      return error.what();
    }
    return "taken";
  };
  const auto contains = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  const torch::Device second(torch::kPrivateUse1, 1);
  EXPECT_TRUE(contains(refusal([&] { linear(torch::randn({2, 192}), far); }), "x is on cpu"));
  EXPECT_TRUE(contains(refusal([&] { linear(torch::randn({2, 192}).to(second), far); }), ":1"));
  expect_error(Errc::kDevice, "stats is on cpu", [&] {
    QuantizedLinear(PackedTensors{w.spec, far.codes, w.stats, far.shared});
  });
  const PackedTensors on_second{w.spec, w.codes.to(second), w.stats.to(second),
                                w.shared.to(second)};
  EXPECT_EQ(linear(torch::randn({2, 192}).to(second), on_second).device(), second);
}

}  // namespace
}  // namespace quantal::testing

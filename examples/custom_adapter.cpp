// A quantization method of your own: a layer, an adapter, a name. Configs, the factory, saving and
// loading then know it.
#include <quantal/torch.h>
#include <torch/torch.h>

#include <iostream>

namespace {

/// Ternary weights: W = scale * code with codes -1, 0, 1 and one scale per row.
class TernaryLinear : public quantal::QuantizedLayerImpl {
 public:
  TernaryLinear(std::int64_t in_features, std::int64_t out_features, bool bias)
      : QuantizedLayerImpl("TernaryLinear", in_features, out_features) {
    codes_ = register_buffer("codes", torch::zeros({out_features, in_features}, torch::kChar));
    scales_ = register_buffer("scales", torch::zeros({out_features, 1}));
    if (bias) set_bias(torch::zeros({out_features}));
  }

  torch::Tensor forward(const torch::Tensor& x) override {
    return torch::linear(x, dequantize_weights().to(x.scalar_type()), bias);
  }
  void quantize_weights(const torch::Tensor& weights) override {
    const auto w = weights.to(torch::kFloat);
    scales_.copy_(w.abs().mean(1, /*keepdim=*/true));
    codes_.copy_((w / scales_).round().clamp(-1, 1));
  }
  torch::Tensor dequantize_weights() const override { return codes_.to(torch::kFloat) * scales_; }

 private:
  torch::Tensor codes_, scales_;
};

class TernaryAdapter : public quantal::QuantizationAdapter {
 public:
  using QuantizationAdapter::QuantizationAdapter;

  quantal::Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                          bool bias) override {
    return quantal::Linear(std::make_shared<TernaryLinear>(in_features, out_features, bias));
  }
  void quantize_model(torch::nn::Module& model) override {
    quantal::replace_linear_with_quantized(model, *this);
  }
};

struct Net : torch::nn::Module {
  Net()
      : up(register_module("up", quantal::Linear(64, 128))),
        down(register_module("down", quantal::Linear(128, 64))) {}
  torch::Tensor forward(const torch::Tensor& x) {
    return down->forward(torch::relu(up->forward(x)));
  }
  quantal::Linear up, down;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "build/custom-adapter";
  torch::manual_seed(0);
  quantal::register_adapter<TernaryAdapter>("ternary");

  const auto config =
      quantal::config_from_json(R"({"method": "ternary", "skip_modules": ["down"]})");
  auto adapter = quantal::create_quantization_adapter(quantal::Backend::CPU, config);
  auto net = std::make_shared<Net>();
  adapter->quantize_model(*net);
  std::cout << adapter->report().to_text() << "\n";

  adapter->save_quantized_model(*net, folder, "{}", {.overwrite = true});
  auto loaded = std::make_shared<Net>();
  // config.json names the adapter: any adapter loads the folder.
  quantal::create_quantization_adapter(quantal::Backend::CPU)
      ->load_quantized_model(folder, *loaded);
  const auto x = torch::randn({4, 64});
  std::cout << "loaded model "
            << (torch::equal(net->forward(x), loaded->forward(x)) ? "is the same" : "differs")
            << "\n";
}

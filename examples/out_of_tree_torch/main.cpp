// Quantizes the linear layers of a libtorch module to HQQ 4-bit and sends a gradient through them.
#include <quantal/torch.h>

#include <cstdio>

namespace {

struct Net : torch::nn::Module {
  Net()
      : up(register_module("up", quantal::Linear(128, 256))),
        down(register_module("down", quantal::Linear(256, 128))) {}
  torch::Tensor forward(const torch::Tensor& x) {
    return down->forward(torch::relu(up->forward(x)));
  }
  quantal::Linear up, down;
};

}  // namespace

int main() {
  torch::manual_seed(0);
  auto net = std::make_shared<Net>();
  const torch::Tensor x = torch::randn({8, 128}, torch::requires_grad());
  const torch::Tensor dense = net->forward(x).detach();

  quantal::QuantizationConfig config;
  config.method = quantal::QuantizationMethod::HQQ;
  config.compute_dtype = quantal::DType::kF32;
  auto adapter = quantal::create_quantization_adapter(quantal::Backend::CPU, config);
  adapter->quantize_model(*net);

  const torch::Tensor y = net->forward(x);
  y.sum().backward();
  const double error = ((y - dense).norm() / dense.norm()).item<double>();
  std::printf("relative error of the output %.4f, gradient %s\n", error,
              x.grad().abs().sum().item<double>() > 0 ? "arrived" : "missing");
  return 0;
}

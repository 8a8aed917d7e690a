// What a call of a quantized layer costs in C++ beyond its kernel: quantal::Linear on one row of
// activations, in turn with the kernel alone on the same buffers; one thread, weights in the cache.
// Prints one line of JSON for each form; bench/overhead.py makes a table of them.
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "quantal/kernels.h"
#include "quantal/torch.h"

namespace {

constexpr std::int64_t kSize = 576;  // the layers of SmolLM2-135M
constexpr int kCalls = 200;          // of one sample
constexpr int kSamples = 201;

/// Microseconds of one call.
template <class Fn>
double sample(Fn fn) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) fn();
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / kCalls;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void measure(const char* name, const quantal::QuantizeOptions& options, torch::ScalarType dtype) {
  const auto weight = torch::randn({kSize, kSize}).mul_(0.02).to(dtype);
  const quantal::PackedTensors packed = quantal::quantize(weight, options);
  quantal::Linear layer(quantal::QuantizedLinear(packed, torch::Tensor(), dtype));
  const auto x = torch::randn({1, kSize}).to(dtype);
  auto y = torch::empty({1, kSize}, x.options());
  const quantal::PackedView view = packed.view();
  const quantal::DType type = quantal::from_torch(dtype);
  const auto call = [&] { layer->forward(x); };
  const auto kernel = [&] {
    quantal::matmul(view, type, x.const_data_ptr(), 1, nullptr, y.mutable_data_ptr(),
                    quantal::serial_executor());
  };
  sample(call), sample(kernel);  // warm-up
  std::vector<double> calls, kernels, differences;
  for (int i = 0; i < kSamples; ++i) {
    calls.push_back(sample(call));
    kernels.push_back(sample(kernel));
    differences.push_back(calls.back() - kernels.back());
  }
  std::printf(
      "{\"form\": \"%s\", \"dtype\": \"%s\", \"call_us\": %.3f, \"kernel_us\": %.3f, "
      "\"overhead_us\": %.3f}\n",
      name, std::string(quantal::dtype_name(type)).c_str(), median(calls), median(kernels),
      median(differences));
}

}  // namespace

int main() {
  at::set_num_threads(1);
  const torch::NoGradGuard no_grad;
  const quantal::QuantizeOptions nf4;  // the default, with double quantization
  quantal::QuantizeOptions hqq, mlx;
  hqq.method = quantal::QuantizationMethod::HQQ;
  mlx.method = quantal::QuantizationMethod::MLX_INT4;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    measure("NF4 + double quantization", nf4, dtype);
    measure("HQQ 4-bit g64", hqq, dtype);
    measure("MLX 4-bit g64", mlx, dtype);
  }
  return 0;
}

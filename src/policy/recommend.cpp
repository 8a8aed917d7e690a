#include <cmath>
#include <cstdio>
#include <string>

#include "policy/probe.h"
#include "quantal/policy.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

void check_size_argument(const char* name, double value) {
  if (std::isfinite(value) && value >= 0) return;
  fail(Errc::kConfig, std::string("get_recommended_config: ") + name + " is " +
                          std::to_string(value) + ", expected a finite number >= 0");
}

QuantizationConfig make(M method, int bits, DType compute_dtype) {
  QuantizationConfig config;
  config.method = method;
  config.bits = bits;
  config.bits_set = true;
  config.compute_dtype = compute_dtype;
  return config;
}

QuantizationConfig no_quantization() {
  QuantizationConfig config;
  config.method = M::NONE;
  return config;
}

/// Gigabytes of weights of `billions` parameters.
struct WeightSizes {
  double fp16, int8;
  explicit WeightSizes(double billions) : fp16(2.0 * billions), int8(billions) {}
};

QuantizationConfig recommend_cuda(const WeightSizes& size, double available, bool has_bf16) {
  const DType dtype = default_compute_dtype(Backend::CUDA, has_bf16);
  if (available >= 1.2 * size.fp16) return no_quantization();
  if (available < 1.5 * size.int8) return make(M::BNB_NF4, 4, dtype);
  return make(M::BNB_INT8, 8, dtype);
}

/// The system and the activations live in the same memory as the weights there.
QuantizationConfig recommend_apple(const WeightSizes& size, double available) {
  const double usable = usable_memory_share(Backend::MPS) * available;
  if (size.fp16 <= usable) return no_quantization();
  if (1.5 * size.int8 <= usable) return make(M::MLX_INT8, 8, DType::kF16);
  return make(M::MLX_INT4, 4, DType::kF16);
}

}  // namespace

double usable_memory_share(Backend backend) noexcept {
  return backend == Backend::MPS || backend == Backend::MLX ? 0.65 : 1.0;
}

DType default_compute_dtype(Backend backend, bool cuda_has_bf16) {
  switch (backend) {
    case Backend::CUDA:
      return cuda_has_bf16 ? DType::kBF16 : DType::kF16;
    case Backend::MPS:
    case Backend::MLX:
      return DType::kF16;
    case Backend::CPU:
      return policy::cpu_has_bf16() ? DType::kBF16 : DType::kF32;
  }
  return DType::kF32;
}

namespace {

QuantizationConfig recommend(Backend backend, const WeightSizes& size, double available_memory_gb,
                             bool cuda_has_bf16) {
  switch (backend) {
    case Backend::CUDA:
      return recommend_cuda(size, available_memory_gb, cuda_has_bf16);
    case Backend::MPS:
    case Backend::MLX:
      return recommend_apple(size, available_memory_gb);
    case Backend::CPU:
      break;
  }
  if (available_memory_gb < 2.0 * size.int8) return make(M::HQQ, 8, DType::kF32);
  return no_quantization();
}

}  // namespace

QuantizationConfig get_recommended_config(Backend backend, double model_size_b,
                                          double available_memory_gb, bool cuda_has_bf16) {
  check_size_argument("model_size_b", model_size_b);
  check_size_argument("available_memory_gb", available_memory_gb);
  QuantizationConfig config =
      recommend(backend, WeightSizes(model_size_b), available_memory_gb, cuda_has_bf16);
  config.note = memory_note(config, model_size_b, available_memory_gb);
  return config;
}

std::string memory_note(const QuantizationConfig& config, double model_size_b,
                        double available_memory_gb) {
  const double bytes_per_parameter = config.method == M::NONE ? 2.0 : config.bits / 8.0;
  const double needed = model_size_b * bytes_per_parameter;
  if (needed <= available_memory_gb) return {};
  char text[160];
  std::snprintf(
      text, sizeof(text),
      "weights of %.4g billion parameters need about %.1f GB with %s, %.1f GB are available",
      model_size_b, needed, std::string(method_name(config.method)).c_str(), available_memory_gb);
  return text;
}

}  // namespace quantal

// Quantizes a matrix to NF4, dequantizes it again and prints what that cost.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <quantal/quantal.hpp>
#include <random>
#include <string>
#include <vector>

int main() {
  constexpr std::int64_t kRows = 256, kCols = 512;
  quantal::Tensor weights = quantal::make_tensor(quantal::DType::kF32, {kRows, kCols});
  auto* values = reinterpret_cast<float*>(weights.bytes.data());
  std::mt19937 generator(7);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (std::int64_t i = 0; i < kRows * kCols; ++i) values[i] = normal(generator);

  try {
    const quantal::PackedMatrix packed = quantal::quantize(
        weights.view(),
        {.method = quantal::QuantizationMethod::BNB_NF4, .group_size = 64, .double_quant = false});
    std::vector<float> back(kRows * kCols);
    quantal::dequantize(packed.view(), {0, kRows, 0, kCols}, quantal::DType::kF32, back.data(),
                        kCols, quantal::serial_executor());

    double error = 0, norm = 0;
    for (std::size_t i = 0; i < back.size(); ++i) {
      const double difference = static_cast<double>(values[i]) - back[i];
      error += difference * difference;
      norm += static_cast<double>(values[i]) * values[i];
    }
    const double bytes = static_cast<double>(packed.codes.size() + packed.stats.size());
    std::printf("%s kernels: relative error %.4f, %.4f bytes per weight\n",
                std::string(quantal::active_cpu_kernels()).c_str(), std::sqrt(error / norm),
                bytes / static_cast<double>(kRows * kCols));
  } catch (const quantal::Error& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
  }
  return 0;
}

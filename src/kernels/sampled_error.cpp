#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

/// Values that are looked at: an estimate to about one percent of itself.
constexpr std::int64_t kSampledValues = 1 << 13;

/// Sums of squares, over as many lanes as compilers like to have.
struct Squares {
  double error = 0, total = 0;

  void add(const std::vector<float>& dense, const std::vector<float>& decoded) {
    constexpr std::size_t kLanes = 8;
    std::array<double, kLanes> errors{}, totals{};
    for (std::size_t c = 0; c < dense.size(); c += kLanes) {
      const std::size_t lanes = std::min(kLanes, dense.size() - c);
      for (std::size_t l = 0; l < lanes; ++l) {
        const double value = dense[c + l];
        const double difference = value - static_cast<double>(decoded[c + l]);
        errors[l] += difference * difference;
        totals[l] += value * value;
      }
    }
    for (const double e : errors) error += e;
    for (const double t : totals) total += t;
  }
};

}  // namespace

double sampled_error(const PackedView& w, DType dtype, const void* weights) {
  const KernelMatrix matrix = kernel_matrix(w);
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "sampled_error: dtype is " + std::string(dtype_name(dtype)) +
                           ", expected f32, f16 or bf16");
  }
  const auto [rows, cols] = std::pair{w.spec.rows, w.spec.cols};
  if (rows == 0 || cols == 0) return 0;
  const std::int64_t count = std::clamp<std::int64_t>(kSampledValues / cols, 1, rows);
  std::vector<float> dense(static_cast<std::size_t>(cols)), decoded(dense.size());
  Squares squares;
  const CpuKernels& kernels = cpu_kernels();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = count == 1 ? 0 : i * (rows - 1) / (count - 1);
    const auto offset = static_cast<std::size_t>(row * cols) * dtype_size(dtype);
    widen_to_f32(dtype, static_cast<const std::uint8_t*>(weights) + offset, cols, dense.data());
    kernels.dequantize(matrix, {.row_begin = row,
                                .row_end = row + 1,
                                .col_begin = 0,
                                .col_end = cols,
                                .out_kind = FloatKind::kF32,
                                .out = decoded.data(),
                                .ld = cols});
    squares.add(dense, decoded);
  }
  return squares.total > 0 ? std::sqrt(squares.error / squares.total) : 0;
}

}  // namespace quantal

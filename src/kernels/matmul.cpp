#include <algorithm>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::int64_t kTaskCodes = 64 * 1024;  // weights of one task
constexpr std::int64_t kColumnUnit = 64;        // output columns are cut at multiples of this

void check_product(const PackedView& w, std::int64_t m_rows, const char* where) {
  if (!supports_packed_matmul(w.spec)) {
    fail(Errc::kUnsupported, std::string(where) +
                                 ": group_map is not row runs, expected row runs "
                                 "(dequantize panels instead)");
  }
  if (m_rows < 0) {
    fail(Errc::kShape,
         std::string(where) + ": m_rows is " + std::to_string(m_rows) + ", expected >= 0");
  }
}

/// Activations as the kernels take them: float32 rows, zero-padded to whole vectors. Borrows the
/// input where it already has that form.
class Inputs {
 public:
  Inputs(const CpuKernels& kernels, FloatKind kind, std::int64_t cols)
      : kernels_(kernels), kind_(kind), cols_(cols), ld_(ceil_div(cols, 16) * 16) {}

  std::int64_t ld() const { return ld_; }
  /// Rows [0, rows) of `in`; valid until the next call.
  const float* widen(const std::uint8_t* in, int rows) {
    if (kind_ == FloatKind::kF32 && cols_ == ld_ && reinterpret_cast<std::uintptr_t>(in) % 4 == 0) {
      return reinterpret_cast<const float*>(in);
    }
    scratch_.resize(static_cast<std::size_t>(ld_ * rows));
    const std::int64_t bytes = kind_ == FloatKind::kF32 ? 4 : 2;
    for (int m = 0; m < rows; ++m) {
      float* row = scratch_.data() + m * ld_;
      kernels_.widen(kind_, in + m * cols_ * bytes, cols_, row);
      std::fill(row + cols_, row + ld_, 0.0F);
    }
    return scratch_.data();
  }

 private:
  const CpuKernels& kernels_;
  FloatKind kind_;
  std::int64_t cols_, ld_;
  std::vector<float> scratch_;
};

/// Calls body(first input row, number of input rows) for blocks that one kernel call takes.
template <class Body>
void for_input_blocks(std::int64_t m_rows, Body body) {
  for (std::int64_t m = 0; m < m_rows; m += kMaxInputRows) {
    body(m, static_cast<int>(std::min<std::int64_t>(kMaxInputRows, m_rows - m)));
  }
}

}  // namespace

bool supports_packed_matmul(const PackedSpec& spec) noexcept {
  return spec.group_map == GroupMap::kRowRuns;
}

std::int64_t packed_matmul_max_rows(const PackedSpec& spec, DType x_dtype) noexcept {
  if (!supports_packed_matmul(spec)) return 0;
  try {
    return x_dtype == DType::kF32 ? cpu_kernels().max_rows_f32 : cpu_kernels().max_rows_16bit;
  } catch (const Error&) {
    return 0;  // QUANTAL_CPU names no set; the product itself reports it
  }
}

void matmul(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows, const float* bias,
            void* y, const Executor& executor) {
  const KernelMatrix matrix = kernel_matrix(w);
  const FloatKind kind = float_kind(dtype, "matmul", "dtype");
  check_product(w, m_rows, "matmul");
  const CpuKernels& kernels = cpu_kernels();
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  const auto* in = static_cast<const std::uint8_t*>(x);
  auto* out = static_cast<std::uint8_t*>(y);
  Inputs inputs(kernels, kind, matrix.cols);
  // Tasks of whole register tiles; no result depends on where they are cut.
  const std::int64_t grain = ceil_div(ceil_div(kTaskCodes, matrix.cols), 8) * 8;
  for_input_blocks(m_rows, [&](std::int64_t m, int count) {
    const MatmulJob job{.x = inputs.widen(in + m * matrix.cols * element, count),
                        .ldx = inputs.ld(),
                        .inputs = count,
                        .bias = bias,
                        .y_kind = kind,
                        .y = out + m * matrix.rows * element,
                        .ldy = matrix.rows};
    executor.parallel_for(0, matrix.rows, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.matmul(matrix, job, begin, end);
    });
  });
}

void matmul_transposed(const PackedView& w, DType dtype, const void* g, std::int64_t m_rows,
                       void* y, const Executor& executor) {
  const KernelMatrix matrix = kernel_matrix(w);
  const FloatKind kind = float_kind(dtype, "matmul_transposed", "dtype");
  check_product(w, m_rows, "matmul_transposed");
  const CpuKernels& kernels = cpu_kernels();
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  const auto* in = static_cast<const std::uint8_t*>(g);
  auto* out = static_cast<std::uint8_t*>(y);
  Inputs inputs(kernels, kind, matrix.rows);
  const std::int64_t units = ceil_div(matrix.cols, kColumnUnit);
  const std::int64_t grain =
      ceil_div(kTaskCodes, kColumnUnit * std::max<std::int64_t>(matrix.rows, 1));
  for_input_blocks(m_rows, [&](std::int64_t m, int count) {
    const TransposedJob job{.g = inputs.widen(in + m * matrix.rows * element, count),
                            .ldg = inputs.ld(),
                            .inputs = count,
                            .y_kind = kind,
                            .y = out + m * matrix.cols * element,
                            .ldy = matrix.cols};
    executor.parallel_for(0, units, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.matmul_transposed(matrix, job, begin * kColumnUnit,
                                std::min(end * kColumnUnit, matrix.cols));
    });
  });
}

}  // namespace quantal

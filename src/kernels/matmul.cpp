#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/cpu/dispatch.h"
#include "kernels/scratch.h"
#include "kernels/tasks.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::int64_t kTaskCodes = 64 * 1024;  // weights of one task

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
    auto* scratch = static_cast<float*>(thread_scratch<Scratch::kInputs>(ld_ * rows * 4));
    const std::int64_t bytes = kind_ == FloatKind::kF32 ? 4 : 2;
    for (int m = 0; m < rows; ++m) {
      float* row = scratch + m * ld_;
      kernels_.widen(kind_, in + m * cols_ * bytes, cols_, row);
      std::fill(row + cols_, row + ld_, 0.0F);
    }
    return scratch;
  }

 private:
  const CpuKernels& kernels_;
  FloatKind kind_;
  std::int64_t cols_, ld_;
};

/// Calls body(first input row, number of input rows) for blocks that one kernel call takes.
template <class Body>
void for_input_blocks(std::int64_t m_rows, std::int64_t most, Body body) {
  for (std::int64_t m = 0; m < m_rows; m += most) body(m, std::min(most, m_rows - m));
}

/// Blocks of nearly equal size, as few as `most` allows.
std::int64_t block_rows(std::int64_t m_rows, std::int64_t most) {
  return ceil_div(m_rows, std::max<std::int64_t>(ceil_div(m_rows, most), 1));
}

/// Rows of weights of one task: whole register tiles; no result depends on where they are cut.
std::int64_t row_grain(const KernelMatrix& matrix, std::int64_t tile) {
  return ceil_div(ceil_div(kTaskCodes, matrix.cols), tile) * tile;
}

std::int64_t column_grain(const KernelMatrix& matrix) {
  return ceil_div(kTaskCodes, kColumnUnit * std::max<std::int64_t>(matrix.rows, 1));
}

/// Multiples of this many elements lie in the same sets of a first-level cache.
constexpr std::int64_t kCacheSetElements = 2048;
constexpr std::int64_t kRowUnit = 8;            // rows of weights of a tile in float32
constexpr std::int64_t kBf16RowUnit = 32;       // rows of weights that stand together at most
constexpr std::int64_t kPackGrain = 32 * 1024;  // activations packed by one task

/// Elements from one packed row of activations to the next: whole units, and not in the same sets.
std::int64_t bf16_ld(std::int64_t width, std::int64_t unit) {
  const std::int64_t ld = ceil_div(width, unit) * unit;
  return ld % kCacheSetElements == 0 ? ld + 32 : ld;
}

/// `width` elements from each of so many rows, followed by a zero, in rows of `ld` elements in the
/// thread's scratch.
const std::uint16_t* pad_rows(const std::uint16_t* in, std::int64_t rows, std::int64_t width,
                              std::int64_t ld, const Executor& executor) {
  auto* packed = static_cast<std::uint16_t*>(thread_scratch<Scratch::kInputs>(ld * rows * 2));
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::copy_n(in + i * width, width, packed + i * ld);  // `in` may be null without rows
      packed[i * ld + width] = 0;
    }
  };
  run_tasks(executor, rows, ceil_div(kPackGrain, std::max<std::int64_t>(width, 1)), body);
  return packed;
}

/// The job with scratch of the calling thread.
Bf16Job with_scratch(Bf16Job job) {
  job.scratch = static_cast<float*>(thread_scratch<Scratch::kSums>(kBf16ScratchFloats * 4));
  return job;
}

void matmul_bf16(const Bf16Kernels& kernels, const KernelMatrix& matrix, const std::uint16_t* x,
                 std::int64_t m_rows, const float* bias, std::uint16_t* y,
                 const Executor& executor) {
  const std::int64_t block = block_rows(m_rows, kMaxBf16Inputs);
  for_input_blocks(m_rows, block, [&](std::int64_t m, std::int64_t count) {
    const Bf16Tiles tiles = kernels.tiles(matrix, count);
    const std::int64_t ld = bf16_ld(tiles.width, 64);
    auto* packed = static_cast<std::uint16_t*>(thread_scratch<Scratch::kInputs>(ld * count * 2));
    const auto pack = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t first = count * t / tiles.count;
        const std::int64_t rows = count * (t + 1) / tiles.count - first;
        kernels.pack(matrix, count, x + (m + first) * matrix.cols, rows, packed + first * ld);
      }
    };
    const std::int64_t work = count * matrix.cols;  // of all tiles
    run_tasks(executor, tiles.count,
              ceil_div(kPackGrain * tiles.count, std::max<std::int64_t>(work, 1)), pack);
    const Bf16Job job{.x = packed,
                      .ldx = ld,
                      .inputs = count,
                      .bias = bias,
                      .y = y + m * matrix.rows,
                      .ldy = matrix.rows};
    const std::int64_t units = ceil_div(matrix.rows, kBf16RowUnit);
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      kernels.matmul(matrix, with_scratch(job), begin * kBf16RowUnit,
                     std::min(end * kBf16RowUnit, matrix.rows));
    };
    share_tasks(executor, units, row_grain(matrix, kBf16RowUnit) / kBf16RowUnit, body);
  });
}

void matmul_transposed_bf16(const Bf16Kernels& kernels, const KernelMatrix& matrix,
                            const std::uint16_t* g, std::int64_t m_rows, std::uint16_t* y,
                            const Executor& executor) {
  const std::int64_t ld = bf16_ld(matrix.rows, 2);
  const std::int64_t units = ceil_div(matrix.cols, kColumnUnit);
  const std::int64_t block = block_rows(m_rows, kMaxBf16Inputs);
  for_input_blocks(m_rows, block, [&](std::int64_t m, std::int64_t count) {
    const std::uint16_t* rows = g + m * matrix.rows;
    if (ld != matrix.rows) {
      rows = pad_rows(rows, count, matrix.rows, ld, executor);
    }
    const Bf16Job job{.x = rows,
                      .ldx = ld,
                      .inputs = count,
                      .bias = nullptr,
                      .y = y + m * matrix.cols,
                      .ldy = matrix.cols};
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      kernels.matmul_transposed(matrix, with_scratch(job), begin * kColumnUnit,
                                std::min(end * kColumnUnit, matrix.cols));
    };
    share_tasks(executor, units, column_grain(matrix), body);
  });
}

}  // namespace

bool supports_packed_matmul(const PackedSpec& spec) noexcept {
  return spec.group_map == GroupMap::kRowRuns;
}

std::int64_t packed_matmul_max_rows(const PackedSpec& spec, DType x_dtype,
                                    ProductKind product) noexcept {
  if (!supports_packed_matmul(spec) || !is_weight_dtype(x_dtype)) return 0;
  try {
    const CpuKernels& kernels = cpu_kernels();
    const MaxRows& limits =
        product == ProductKind::kForward ? kernels.max_rows : kernels.transposed_max_rows;
    return limits.rows[static_cast<int>(x_dtype)];
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
  if (kind == FloatKind::kBF16 && kernels.bf16 != nullptr) {
    return matmul_bf16(kernels.bf16(), matrix, static_cast<const std::uint16_t*>(x), m_rows, bias,
                       static_cast<std::uint16_t*>(y), executor);
  }
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  const auto* in = static_cast<const std::uint8_t*>(x);
  auto* out = static_cast<std::uint8_t*>(y);
  Inputs inputs(kernels, kind, matrix.cols);
  for_input_blocks(m_rows, kMaxInputRows, [&](std::int64_t m, std::int64_t count) {
    const MatmulJob job{.x = inputs.widen(in + m * matrix.cols * element, static_cast<int>(count)),
                        .ldx = inputs.ld(),
                        .inputs = static_cast<int>(count),
                        .bias = bias,
                        .y_kind = kind,
                        .y = out + m * matrix.rows * element,
                        .ldy = matrix.rows};
    share_tasks(executor, ceil_div(matrix.rows, kRowUnit), row_grain(matrix, kRowUnit) / kRowUnit,
                [&](std::int64_t begin, std::int64_t end) {
                  kernels.matmul(matrix, job, begin * kRowUnit,
                                 std::min(end * kRowUnit, matrix.rows));
                });
  });
}

void matmul_transposed(const PackedView& w, DType dtype, const void* g, std::int64_t m_rows,
                       void* y, const Executor& executor) {
  const KernelMatrix matrix = kernel_matrix(w);
  const FloatKind kind = float_kind(dtype, "matmul_transposed", "dtype");
  check_product(w, m_rows, "matmul_transposed");
  const CpuKernels& kernels = cpu_kernels();
  if (kind == FloatKind::kBF16 && kernels.bf16 != nullptr) {
    return matmul_transposed_bf16(kernels.bf16(), matrix, static_cast<const std::uint16_t*>(g),
                                  m_rows, static_cast<std::uint16_t*>(y), executor);
  }
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  const auto* in = static_cast<const std::uint8_t*>(g);
  auto* out = static_cast<std::uint8_t*>(y);
  Inputs inputs(kernels, kind, matrix.rows);
  const std::int64_t units = ceil_div(matrix.cols, kColumnUnit);
  for_input_blocks(m_rows, kMaxInputRows, [&](std::int64_t m, std::int64_t count) {
    const TransposedJob job{
        .g = inputs.widen(in + m * matrix.rows * element, static_cast<int>(count)),
        .ldg = inputs.ld(),
        .inputs = static_cast<int>(count),
        .y_kind = kind,
        .y = out + m * matrix.cols * element,
        .ldy = matrix.cols};
    const auto body = [&](std::int64_t begin, std::int64_t end) {
      kernels.matmul_transposed(matrix, job, begin * kColumnUnit,
                                std::min(end * kColumnUnit, matrix.cols));
    };
    share_tasks(executor, units, column_grain(matrix), body);
  });
}

}  // namespace quantal

// Products of activations in int8 with packed codes (quantal/kernels.h, matmul_int8_activations).
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/activations.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/scratch.h"
#include "kernels/tasks.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr const char* kWhere = "matmul_int8_activations";
constexpr std::int64_t kTaskCodes = 64 * 1024;   // weights of one task
constexpr std::int64_t kTaskInputs = 32 * 1024;  // activations that one task rounds
constexpr std::int64_t kMinRun = 16;

/// Levels of a table: integers where a multiple of 1 or 2 makes all of them integers, else rounded
/// to 1/127 of the largest.
void fill_levels(const KernelMatrix& matrix, IntForm& form) {
  constexpr std::int32_t kCentre = 128;
  float largest = 0.0F;
  bool finite = true;
  for (const float v : matrix.table) {
    finite = finite && std::isfinite(v);
    largest = std::max(largest, std::fabs(v));
  }
  const auto exact = [&](float factor) {
    return std::ranges::all_of(matrix.table, [&](float v) {
      return std::fabs(v * factor) <= kMaxIntLevel && std::rint(v * factor) == v * factor;
    });
  };
  const float factor = exact(1.0F) ? 1.0F : exact(2.0F) ? 2.0F : kMaxIntLevel / largest;
  form.unit *= finite ? 1.0F / factor : std::nanf("");
  form.centre = kCentre;
  for (std::size_t i = 0; i < 16; ++i) {
    const float level = finite ? std::rint(matrix.table[i] * factor) : 0.0F;
    form.levels[i] = static_cast<std::uint8_t>(static_cast<int>(level) + kCentre);
  }
}

IntForm form_of(const PackedSpec& spec, const KernelMatrix& matrix, const IntKernels& kernels) {
  IntForm form{};
  form.run = int8_activation_run(spec);
  form.centre = spec.centre;
  form.unit = spec.offset == Offset::kOver127 ? kInverse127 : 1.0F;
  form.table = spec.code_map != CodeMap::kInteger;
  if (form.table) fill_levels(matrix, form);
  if (kernels.signed_codes && form.wide(spec.bits)) form.centre -= 128;
  return form;
}

/// Rows of activations of one job in the calling thread's scratch, in tiles of nearly equal size.
class IntInputs {
 public:
  IntInputs(const PackedSpec& spec, std::int64_t rows, std::int64_t run, std::int64_t most)
      : rows_(rows), ldq_(ceil_div(spec.cols, 64) * 16), ldr_(ceil_div(spec.cols, run)) {
    first_.tile = ceil_div(rows, ceil_div(rows, most));
    const std::int64_t statistics = ceil_div(rows * ldr_, 16) * 16;
    first_.q = static_cast<std::int32_t*>(
        thread_scratch<Scratch::kInputs>(4 * (rows * ldq_ + 3 * statistics)));
    first_.scale = reinterpret_cast<float*>(first_.q + rows * ldq_);
    first_.total = first_.scale + statistics;
    first_.start = reinterpret_cast<std::int32_t*>(first_.total + statistics);
  }
  std::int64_t ldq() const { return ldq_; }
  std::int64_t ldr() const { return ldr_; }
  IntRow first() const { return first_; }
  std::int64_t tiles() const { return ceil_div(rows_, first_.tile); }
  IntRow tile(std::int64_t t) const {
    const std::int64_t row = t * first_.tile;
    return {.tile = std::min(first_.tile, rows_ - row),
            .q = first_.q + row * ldq_,
            .scale = first_.scale + row * ldr_,
            .total = first_.total + row * ldr_,
            .start = first_.start + row * ldr_};
  }

 private:
  std::int64_t rows_, ldq_, ldr_;
  IntRow first_{};
};

void check_form(const PackedSpec& spec, std::int64_t m_rows) {
  const std::string refusal = int8_activations_refusal(spec);
  if (!refusal.empty()) fail(Errc::kUnsupported, std::string(kWhere) + ": " + refusal);
  if (m_rows < 0) {
    fail(Errc::kShape,
         std::string(kWhere) + ": m_rows is " + std::to_string(m_rows) + ", expected >= 0");
  }
}

/// One block of at most kMaxIntInputs rows.
void multiply_block(const IntKernels& kernels, const KernelMatrix& matrix, const IntForm& form,
                    const std::uint8_t* x, const IntInputs& inputs, IntJob job,
                    const Executor& executor) {
  const std::int64_t row_bytes = matrix.cols * (job.y_kind == FloatKind::kF32 ? 4 : 2);
  const auto round = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      kernels.quantize(form, job.y_kind, x + t * job.x.tile * row_bytes, matrix.cols,
                       inputs.tile(t));
    }
  };
  run_tasks(executor, inputs.tiles(), ceil_div(kTaskInputs, matrix.cols * job.x.tile), round);
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    IntJob task = job;
    task.scratch = thread_scratch<Scratch::kSums>(kIntScratchBytes);
    kernels.matmul(matrix, task, begin * kIntRowUnit, std::min(end * kIntRowUnit, matrix.rows));
  };
  run_tasks(executor, ceil_div(matrix.rows, kIntRowUnit),
            ceil_div(kTaskCodes, kIntRowUnit * matrix.cols), body);
}

}  // namespace

std::int64_t int8_activation_run(const PackedSpec& spec) {
  std::int64_t run = kMaxIntRun;
  if (spec.group_size == spec.cols) return run;
  while (spec.group_size % run != 0) run /= 2;
  return run;
}

std::string int8_activations_refusal(const PackedSpec& spec) {
  const auto groups = [&] { return "groups of " + std::to_string(spec.group_size); };
  if (spec.group_map != GroupMap::kRowRuns) {
    return "statistics are shared by rows, expected groups along rows";
  }
  if (spec.code_map == CodeMap::kE4M3 || spec.code_map == CodeMap::kE5M2) {
    return "weights are 8-bit floats, expected integers or a table of 16 values";
  }
  if (spec.cols % spec.group_size != 0) {
    return groups() + " cross rows of " + std::to_string(spec.cols) +
           ", expected a divisor of in_features";
  }
  if (spec.group_size % kMinRun != 0 && spec.group_size != spec.cols) {
    return groups() + ", expected a multiple of " + std::to_string(kMinRun) + " or whole rows";
  }
  return {};
}

void matmul_int8_activations(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows,
                             const float* bias, void* y, const Executor& executor) {
  matmul_int8_activations(cpu_kernels().integers(), w, dtype, x, m_rows, bias, y, executor);
}

void matmul_int8_activations(const IntKernels& kernels, const PackedView& w, DType dtype,
                             const void* x, std::int64_t m_rows, const float* bias, void* y,
                             const Executor& executor) {
  const KernelMatrix matrix = kernel_matrix(w);
  const FloatKind kind = float_kind(dtype, kWhere, "dtype");
  check_form(w.spec, m_rows);
  if (m_rows == 0) return;
  const IntForm form = form_of(w.spec, matrix, kernels);
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  const std::int64_t block = ceil_div(m_rows, ceil_div(m_rows, kMaxIntInputs));
  for (std::int64_t m = 0; m < m_rows; m += block) {
    const std::int64_t count = std::min(block, m_rows - m);
    const IntInputs inputs(w.spec, count, form.run, kernels.tile);
    const IntJob job{.form = &form,
                     .x = inputs.first(),
                     .ldq = inputs.ldq(),
                     .ldr = inputs.ldr(),
                     .inputs = count,
                     .bias = bias,
                     .y_kind = kind,
                     .y = static_cast<std::uint8_t*>(y) + m * matrix.rows * element,
                     .ldy = matrix.rows,
                     .scratch = nullptr};
    multiply_block(kernels, matrix, form,
                   static_cast<const std::uint8_t*>(x) + m * matrix.cols * element, inputs, job,
                   executor);
  }
}

}  // namespace quantal

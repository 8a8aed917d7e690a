#include <string>

#include "kernels/cpu/dispatch.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

// Output of one task: far above the cost of starting it.
constexpr std::int64_t kTaskBytes = 64 * 1024;

void check_panel(const PackedSpec& spec, const Panel& p, std::int64_t ld) {
  const bool rows_ok = 0 <= p.row_begin && p.row_begin <= p.row_end && p.row_end <= spec.rows;
  const bool cols_ok = 0 <= p.col_begin && p.col_begin <= p.col_end && p.col_end <= spec.cols;
  const auto range = [](std::int64_t a, std::int64_t b) {
    return "[" + std::to_string(a) + ", " + std::to_string(b) + ")";
  };
  if (!rows_ok || !cols_ok) {
    fail(Errc::kShape, "dequantize: panel is rows " + range(p.row_begin, p.row_end) +
                           " x columns " + range(p.col_begin, p.col_end) + ", expected a part of " +
                           std::to_string(spec.rows) + " x " + std::to_string(spec.cols));
  }
  if (p.col_begin % kColumnUnit != 0) {
    fail(Errc::kShape, "dequantize: col_begin is " + std::to_string(p.col_begin) +
                           ", expected a multiple of " + std::to_string(kColumnUnit));
  }
  if (ld < p.col_end - p.col_begin) {
    fail(Errc::kShape, "dequantize: ld is " + std::to_string(ld) + ", expected at least " +
                           std::to_string(p.col_end - p.col_begin));
  }
}

}  // namespace

void dequantize(const PackedView& w, const Panel& panel, DType out_dtype, void* out,
                std::int64_t ld, const Executor& executor) {
  const KernelMatrix matrix = kernel_matrix(w);
  const FloatKind kind = float_kind(out_dtype, "dequantize", "out_dtype");
  check_panel(w.spec, panel, ld);
  const auto element = static_cast<std::int64_t>(dtype_size(out_dtype));
  const std::int64_t width = panel.col_end - panel.col_begin;
  if (width == 0 || panel.row_begin == panel.row_end) return;
  const CpuKernels& kernels = cpu_kernels();
  auto* bytes = static_cast<std::uint8_t*>(out);
  executor.parallel_for(panel.row_begin, panel.row_end, ceil_div(kTaskBytes, width * element),
                        [&](std::int64_t begin, std::int64_t end) {
                          const DequantizeJob job{
                              .row_begin = begin,
                              .row_end = end,
                              .col_begin = panel.col_begin,
                              .col_end = panel.col_end,
                              .out_kind = kind,
                              .out = bytes + (begin - panel.row_begin) * ld * element,
                              .ld = ld};
                          kernels.dequantize(matrix, job);
                        });
}

}  // namespace quantal

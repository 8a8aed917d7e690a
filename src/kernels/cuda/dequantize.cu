#include "kernels/cuda/dequantize_inl.h"
#include "kernels/cuda/launchers.h"

namespace quantal::cuda {

void dequantize(const DequantizeArgs& args, Stream stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const Matrix& w = args.w;
  const bool pairs =
      w.groups == GroupKind::kRowRuns && w.cols % kChunk == 0 && w.group.divisor % kChunk == 0;
  if (pairs) {
    const std::int64_t items = args.rows * ((args.cols + 31) / 32);
    start("dequantize_pairs", dequantize_pairs, dequantize_geometry(items), args, stream);
  } else {
    start("dequantize_elements", dequantize_elements, dequantize_geometry(args.rows * args.cols),
          args, stream);
  }
}

void row_square_sums(const NormArgs& args, Stream stream) {
  if (args.w.rows == 0) return;
  start("row_square_sums", row_square_sums_kernel, norm_geometry(args.w.rows), args, stream);
}

}  // namespace quantal::cuda

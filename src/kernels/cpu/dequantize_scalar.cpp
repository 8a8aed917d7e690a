#include "kernels/cpu/dequantize_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {

void decode_scalar(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                   float* out) noexcept {
  decode_row<VecScalar>(w, row, col, count, out);
}

void dequantize_scalar(const KernelMatrix& w, const DequantizeJob& job) noexcept {
  dequantize_kernel<VecScalar>(w, job);
}

void widen_scalar(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept {
  widen_kernel<VecScalar>(kind, in, n, out);
}

}  // namespace quantal

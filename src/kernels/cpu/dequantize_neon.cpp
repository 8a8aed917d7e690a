#include "kernels/cpu/dequantize_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {

void decode_neon(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                 float* out) noexcept {
  decode_row<VecNeon>(w, row, col, count, out);
}

void dequantize_neon(const KernelMatrix& w, const DequantizeJob& job) noexcept {
  dequantize_kernel<VecNeon>(w, job);
}

void widen_neon(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept {
  widen_kernel<VecNeon>(kind, in, n, out);
}

}  // namespace quantal

#include "kernels/cpu/dequantize_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {

void decode_avx2(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                 float* out) noexcept {
  decode_row<VecAvx2>(w, row, col, count, out);
}

void dequantize_avx2(const KernelMatrix& w, const DequantizeJob& job) noexcept {
  dequantize_kernel<VecAvx2>(w, job);
}

void widen_avx2(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept {
  widen_kernel<VecAvx2>(kind, in, n, out);
}

}  // namespace quantal

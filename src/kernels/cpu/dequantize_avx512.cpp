#include "kernels/cpu/dequantize_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {

void decode_avx512(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                   float* out) noexcept {
  decode_row<VecAvx512>(w, row, col, count, out);
}

void dequantize_avx512(const KernelMatrix& w, const DequantizeJob& job) noexcept {
  dequantize_kernel<VecAvx512>(w, job);
}

void widen_avx512(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept {
  widen_kernel<VecAvx512>(kind, in, n, out);
}

}  // namespace quantal

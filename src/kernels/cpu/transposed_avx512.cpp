#include "kernels/cpu/transposed_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {

void matmul_transposed_avx512(const KernelMatrix& w, const TransposedJob& job,
                              std::int64_t col_begin, std::int64_t col_end) noexcept {
  matmul_transposed_kernel<VecAvx512>(w, decode_avx512, job, col_begin, col_end);
}

}  // namespace quantal

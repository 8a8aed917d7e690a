#include "kernels/cpu/transposed_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {

void matmul_transposed_avx2(const KernelMatrix& w, const TransposedJob& job, std::int64_t col_begin,
                            std::int64_t col_end) noexcept {
  matmul_transposed_kernel<VecAvx2>(w, decode_avx2, job, col_begin, col_end);
}

}  // namespace quantal

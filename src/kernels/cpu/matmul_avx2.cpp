#include "kernels/cpu/matmul_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {

void matmul_avx2(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                 std::int64_t row_end) noexcept {
  matmul_kernel<VecAvx2>(w, decode_avx2, job, row_begin, row_end);
}

}  // namespace quantal

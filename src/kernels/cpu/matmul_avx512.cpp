#include "kernels/cpu/matmul_inl.h"
#include "kernels/cpu/vec_avx512.h"

namespace quantal {

void matmul_avx512(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                   std::int64_t row_end) noexcept {
  matmul_kernel<VecAvx512>(w, decode_avx512, job, row_begin, row_end);
}

}  // namespace quantal

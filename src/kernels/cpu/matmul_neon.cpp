#include "kernels/cpu/matmul_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {

void matmul_neon(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                 std::int64_t row_end) noexcept {
  matmul_kernel<VecNeon>(w, decode_neon, job, row_begin, row_end);
}

}  // namespace quantal

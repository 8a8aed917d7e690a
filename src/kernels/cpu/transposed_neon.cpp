#include "kernels/cpu/transposed_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {

void matmul_transposed_neon(const KernelMatrix& w, const TransposedJob& job, std::int64_t col_begin,
                            std::int64_t col_end) noexcept {
  matmul_transposed_kernel<VecNeon>(w, decode_neon, job, col_begin, col_end);
}

}  // namespace quantal

#include "kernels/cpu/matmul_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {

void matmul_scalar(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                   std::int64_t row_end) noexcept {
  matmul_kernel<VecScalar>(w, decode_scalar, job, row_begin, row_end);
}

}  // namespace quantal

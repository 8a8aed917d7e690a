#include "kernels/cpu/transposed_inl.h"
#include "kernels/cpu/vec_scalar.h"

namespace quantal {

void matmul_transposed_scalar(const KernelMatrix& w, const TransposedJob& job,
                              std::int64_t col_begin, std::int64_t col_end) noexcept {
  matmul_transposed_kernel<VecScalar>(w, decode_scalar, job, col_begin, col_end);
}

}  // namespace quantal

#include "kernels/cuda/small_launch_inl.h"

namespace quantal::cuda {

void small_matmul_f16(const SmallArgs& args, Stream stream) {
  small_matmul_any<FloatKind::kF16>(args, stream);
}

}  // namespace quantal::cuda

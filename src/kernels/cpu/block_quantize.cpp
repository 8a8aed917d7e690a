// Chooses the block quantizer primitives of the active kernel set.
#include "kernels/block_quantize.h"

#include "quantal/kernels.h"

namespace quantal {

const BlockQuantizeKernels& block_quantize_kernels() {
  const std::string_view active = active_cpu_kernels();
#if defined(__x86_64__) || defined(__i386__)
  if (active.starts_with("avx512")) return block_quantize_kernels_avx512();
  if (active == "avx2") return block_quantize_kernels_avx2();
#elif defined(__aarch64__)
  if (active == "neon") return block_quantize_kernels_neon();
#endif
  return block_quantize_kernels_scalar();
}

}  // namespace quantal

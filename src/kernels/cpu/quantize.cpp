// Chooses the quantizer primitives of the active kernel set.
#include "kernels/quantize.h"

#include "quantal/kernels.h"

namespace quantal {

const QuantizeKernels& quantize_kernels() {
  const std::string_view active = active_cpu_kernels();
#if defined(__x86_64__) || defined(__i386__)
  if (active.starts_with("avx512")) return quantize_kernels_avx512();
  if (active == "avx2") return quantize_kernels_avx2();
#elif defined(__aarch64__)
  if (active == "neon") return quantize_kernels_neon();
#endif
  return quantize_kernels_scalar();
}

}  // namespace quantal

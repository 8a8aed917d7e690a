// Chooses the rounded quantizer primitives of the active kernel set.
#include "kernels/rounded.h"

#include "quantal/kernels.h"

namespace quantal {

const RoundedKernels& rounded_kernels() {
  const std::string_view active = active_cpu_kernels();
#if defined(__x86_64__) || defined(__i386__)
  if (active.starts_with("avx512")) return rounded_kernels_avx512();
  if (active == "avx2") return rounded_kernels_avx2();
#elif defined(__aarch64__)
  if (active == "neon") return rounded_kernels_neon();
#endif
  return rounded_kernels_scalar();
}

}  // namespace quantal

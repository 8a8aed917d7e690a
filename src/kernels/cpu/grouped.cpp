// Chooses the grouped quantizer primitives of the active kernel set.
#include "kernels/grouped.h"

#include "quantal/kernels.h"

namespace quantal {

const GroupedKernels& grouped_kernels() {
  const std::string_view active = active_cpu_kernels();
#if defined(__x86_64__) || defined(__i386__)
  if (active.starts_with("avx512")) return grouped_kernels_avx512();
  if (active == "avx2") return grouped_kernels_avx2();
#elif defined(__aarch64__)
  if (active == "neon") return grouped_kernels_neon();
#endif
  return grouped_kernels_scalar();
}

}  // namespace quantal

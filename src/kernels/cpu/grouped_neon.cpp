// The grouped quantizer primitives on 128-bit vectors.
#define QUANTAL_LANES 4
#define QUANTAL_QUANTIZE_SET "neon"
#include "kernels/cpu/grouped_inl.h"

namespace quantal {

const GroupedKernels& grouped_kernels_neon() { return kKernels; }

}  // namespace quantal

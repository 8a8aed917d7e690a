// The grouped quantizer primitives on 256-bit vectors.
#define QUANTAL_LANES 8
#define QUANTAL_QUANTIZE_SET "avx2"
#include "kernels/cpu/grouped_inl.h"

namespace quantal {

const GroupedKernels& grouped_kernels_avx2() { return kKernels; }

}  // namespace quantal

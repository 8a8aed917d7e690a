// The grouped quantizer primitives on 512-bit vectors.
#define QUANTAL_LANES 16
#define QUANTAL_QUANTIZE_SET "avx512"
#include "kernels/cpu/grouped_inl.h"

namespace quantal {

const GroupedKernels& grouped_kernels_avx512() { return kKernels; }

}  // namespace quantal

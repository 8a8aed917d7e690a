// The rounded quantizer primitives on 128-bit vectors.
#define QUANTAL_LANES 4
#define QUANTAL_ROUNDED_SET "neon"
#include "kernels/cpu/rounded_inl.h"

namespace quantal {

const RoundedKernels& rounded_kernels_neon() { return kKernels; }

}  // namespace quantal

// The rounded quantizer primitives on 256-bit vectors.
#define QUANTAL_LANES 8
#define QUANTAL_ROUNDED_SET "avx2"
#include "kernels/cpu/rounded_inl.h"

namespace quantal {

const RoundedKernels& rounded_kernels_avx2() { return kKernels; }

}  // namespace quantal

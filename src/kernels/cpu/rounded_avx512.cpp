// The rounded quantizer primitives on 512-bit vectors.
#define QUANTAL_LANES 16
#define QUANTAL_ROUNDED_SET "avx512"
#include "kernels/cpu/rounded_inl.h"

namespace quantal {

const RoundedKernels& rounded_kernels_avx512() { return kKernels; }

}  // namespace quantal

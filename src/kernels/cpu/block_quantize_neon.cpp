// The block quantizer primitives on 128-bit vectors.
#define QUANTAL_LANES 4
#define QUANTAL_BLOCK_QUANTIZE_SET "neon"
#include "kernels/cpu/block_quantize_inl.h"

namespace quantal {

const BlockQuantizeKernels& block_quantize_kernels_neon() { return kKernels; }

}  // namespace quantal

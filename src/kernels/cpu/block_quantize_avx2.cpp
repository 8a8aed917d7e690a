// The block quantizer primitives on 256-bit vectors.
#define QUANTAL_LANES 8
#define QUANTAL_BLOCK_QUANTIZE_SET "avx2"
#include "kernels/cpu/block_quantize_inl.h"

namespace quantal {

const BlockQuantizeKernels& block_quantize_kernels_avx2() { return kKernels; }

}  // namespace quantal

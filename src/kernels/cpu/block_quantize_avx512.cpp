// The block quantizer primitives on 512-bit vectors.
#define QUANTAL_LANES 16
#define QUANTAL_BLOCK_QUANTIZE_SET "avx512"
#include "kernels/cpu/block_quantize_inl.h"

namespace quantal {

const BlockQuantizeKernels& block_quantize_kernels_avx512() { return kKernels; }

}  // namespace quantal

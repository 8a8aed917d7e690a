// The quantizer primitives on 512-bit vectors.
#define QUANTAL_LANES 16
#define QUANTAL_QUANTIZE_SET "avx512"
#include "kernels/cpu/quantize_inl.h"

namespace quantal {

const QuantizeKernels& quantize_kernels_avx512() { return kKernels; }

}  // namespace quantal

// Row-wise int8 codes on 128-bit vectors.
#define QUANTAL_LANES 4
#include "kernels/cpu/row_int8_inl.h"

namespace quantal {

void encode_row_int8_neon(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes) {
  encode_row_int8(w, n, factor, codes);
}

}  // namespace quantal

// The quantizer primitive of row-wise 8-bit integers whose weights pass through binary16 first.
//
// One set per instruction set, all with identical results. It knows nothing of dialects; buffers
// must be valid, nothing is checked here and nothing throws.
#pragma once

#include <cstdint>

#include "kernels/quantize.h"

namespace quantal {

/// codes[i] = rint(f16(w[i]) * factor) + 128 for a run of n >= 1 weights: f16() rounds to binary16,
/// half to even (nothing to do for weights that are binary16), the product is rounded to float32,
/// rint is half to even. The caller keeps |f16(w[i]) * factor| at most 127.5 and every f16(w[i])
/// finite.
using EncodeRowInt8 = void (*)(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes);

/// The primitive of active_cpu_kernels().
EncodeRowInt8 row_int8_encoder();

/// Each set's own (tests compare them).
void encode_row_int8_scalar(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes);
void encode_row_int8_avx2(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes);
void encode_row_int8_avx512(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes);
void encode_row_int8_neon(WeightRun w, std::int64_t n, float factor, std::uint8_t* codes);

}  // namespace quantal

// The instructions for products of bfloat16 and for rounding to it. AVX-512 with BF16 only;
// included by *_avx512bf16.cpp alone.
#pragma once

#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

inline __m512i load_512(const void* p) { return _mm512_loadu_si512(p); }

/// sum += products of pairs of w and x. As assembler: with the intrinsic GCC 12 loads operands that
/// stand in registers again for each product, and copies sums.
[[gnu::always_inline]] inline void add_products(__m512& sum, __m512i w, __m512i x) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

/// Both as bfloat16, `low` first; subnormal numbers become zero.
inline __m512i narrow_two(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace
}  // namespace quantal

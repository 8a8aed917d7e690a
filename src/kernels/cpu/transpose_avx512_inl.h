// 16 x 16 words of 32 bits on AVX-512: what lies row by row becomes a lane per row.
#pragma once

#include "kernels/cpu/vec_avx512.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Transposes 16 x 16 words of 32 bits. `a` is used up; store(i, word i of all rows) in any order.
template <class Store>
[[gnu::always_inline]] inline void transpose_16(__m512i (&a)[16], Store store) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {  // words of rows r and r + 1 in turn
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {  // block q of a[r + i]: word 4 q + i of rows r .. r + 3
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // blocks of four rows side by side
    const __m512i low02 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    const __m512i high02 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
    store(i, _mm512_shuffle_i32x4(low02, high02, 0x88));
    store(4 + i, _mm512_shuffle_i32x4(low13, high13, 0x88));
    store(8 + i, _mm512_shuffle_i32x4(low02, high02, 0xDD));
    store(12 + i, _mm512_shuffle_i32x4(low13, high13, 0xDD));
  }
}

}  // namespace
}  // namespace quantal

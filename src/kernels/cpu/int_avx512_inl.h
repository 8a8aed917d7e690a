// Integers of 16 weight rows on AVX-512 (F, BW, DQ, VL), all but the dot product (int_inl.h).
#pragma once

#include "kernels/cpu/int_inl.h"
#include "kernels/cpu/transpose_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct IntAvx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kInputs = 6;
  static constexpr bool kHoldSums = true;
  static constexpr int kDirectInputs = 2;
  static constexpr bool kCopyUnits = true;
  static constexpr bool kHalves = true;

  static I load_i(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_i(std::int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I set1_i(std::int32_t x) { return _mm512_set1_epi32(x); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  static I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int kBy>
  static I shift(I a) {
    if constexpr (kBy > 0) return _mm512_srli_epi32(a, kBy);
    if constexpr (kBy < 0) return _mm512_slli_epi32(a, -kBy);
    return a;
  }
  static I load_levels(const std::uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I lookup(I levels, I index) { return _mm512_shuffle_epi8(levels, index); }

  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set1_f(float x) { return _mm512_set1_ps(x); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_f(I a) { return _mm512_cvtepi32_ps(a); }
  static F cast_f(I a) { return _mm512_castsi512_ps(a); }
  static F low_half(bool f16, I words) {
    return f16 ? _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))
               : cast_f(_mm512_slli_epi32(words, 16));
  }
  static F high_half(bool f16, I words) {
    const I high = _mm512_srli_epi32(words, 16);
    return f16 ? _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high)) : cast_f(_mm512_slli_epi32(high, 16));
  }

  static void transpose(const std::uint8_t* const* rows, std::int64_t offset, std::int64_t n,
                        I* out) {
    const __mmask16 mask = n >= 16 ? 0xFFFF : VecAvx512::first(n > 0 ? static_cast<int>(n) : 0);
    I a[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_maskz_loadu_epi32(mask, rows[r] + offset);
    transpose_16(a, [=](int i, I word) { out[i] = word; });
  }
};

}  // namespace
}  // namespace quantal

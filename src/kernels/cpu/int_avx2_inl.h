// Integers of 8 weight rows on AVX2 and FMA, all but the dot product (int_inl.h).
#pragma once

#include "kernels/cpu/int_inl.h"
#include "kernels/cpu/vec_avx2.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct IntAvx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kInputs = 4;
  static constexpr bool kHoldSums = false;
  static constexpr int kDirectInputs = 0;
  static constexpr bool kCopyUnits = false;
  static constexpr bool kHalves = false;

  static const __m256i* at(const void* p) { return static_cast<const __m256i*>(p); }
  static I load_i(const std::int32_t* p) { return _mm256_loadu_si256(at(p)); }
  static void store_i(std::int32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static I set1_i(std::int32_t x) { return _mm256_set1_epi32(x); }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_i(I a, I b) { return _mm256_or_si256(a, b); }
  static I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int kBy>
  static I shift(I a) {
    if constexpr (kBy > 0) return _mm256_srli_epi32(a, kBy);
    if constexpr (kBy < 0) return _mm256_slli_epi32(a, -kBy);
    return a;
  }
  static I load_levels(const std::uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I lookup(I levels, I index) { return _mm256_shuffle_epi8(levels, index); }

  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static void store_f(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set1_f(float x) { return _mm256_set1_ps(x); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_f(I a) { return _mm256_cvtepi32_ps(a); }
  static F cast_f(I a) { return _mm256_castsi256_ps(a); }

  static void transpose(const std::uint8_t* const* rows, std::int64_t offset, std::int64_t n,
                        I* out) {
    I a[8];
    I b[8];
    if (n >= 8) {
      for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256(at(rows[r] + offset));
    } else {
      const I mask = VecAvx2::first(n > 0 ? static_cast<int>(n) : 0).lo;
      for (int r = 0; r < 8; ++r) {
        a[r] = _mm256_maskload_epi32(reinterpret_cast<const int*>(rows[r] + offset), mask);
      }
    }
    for (int r = 0; r < 8; r += 2) {  // words of rows r and r + 1 in turn
      b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {  // half q of a[r + i]: word 4 q + i of rows r .. r + 3
      a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // halves of four rows side by side
      out[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
      out[4 + i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
  }
};

}  // namespace
}  // namespace quantal

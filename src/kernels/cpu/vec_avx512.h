// 16 lanes on AVX-512 (F, BW, DQ, VL): one zmm per F and U, two per D and L. Semantics:
// vec_scalar.h.
#pragma once

// GCC 12's own header reads an undefined register on purpose (bug 105593) and then warns about it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct VecAvx512 {
  using F = __m512;
  using U = __m512i;
  using M = __mmask16;
  struct D {
    __m512d lo, hi;
  };
  struct L {
    __m512i lo, hi;
  };
  struct MD {
    __mmask8 lo, hi;
  };

  static constexpr int kTileRows = 4;
  static constexpr int kTileInputs = 4;
  static constexpr int kDirectRows = 4;

  // ---- float32: memory
  static __mmask16 first(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static __m256i half(const std::uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static F load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(half(p)); }
  static F load_bf16(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(p)), 16));
  }
  static void store_f16(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  /// Bits of the nearest bfloat16 in the high half of each lane (vcvtneps2bf16 would flush
  /// subnormals).
  static __m512i bf16_bits(F a) {
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
  }
  static void store_bf16(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)));
  }
  static F round_f16(F a) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F round_bf16(F a) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(a), high));
  }

  // ---- float32: arithmetic
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F rint(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static M lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static U select_u(M m, U a, U b) { return _mm512_mask_blend_epi32(m, b, a); }
  static bool any(M m) { return m != 0; }
  static __m256 low(F a) { return _mm512_castps512_ps256(a); }
  static __m256 high(F a) { return _mm512_extractf32x8_ps(a, 1); }
  static float sum(F a) {
    const __m256 w8 = _mm256_add_ps(low(a), high(a));
    const __m128 w4 = _mm_add_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_add_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_add_ss(w2, _mm_movehdup_ps(w2)));
  }
  static float reduce_max(F a) {
    const __m256 w8 = _mm256_max_ps(low(a), high(a));
    const __m128 w4 = _mm_max_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_max_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_max_ss(w2, _mm_movehdup_ps(w2)));
  }
  static float reduce_min(F a) {
    const __m256 w8 = _mm256_min_ps(low(a), high(a));
    const __m128 w4 = _mm_min_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_min_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_min_ss(w2, _mm_movehdup_ps(w2)));
  }

  // ---- uint32 and codes
  static U set1_u(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static U load_u8(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_u8(std::uint8_t* p, U a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static U cast_u(F a) { return _mm512_castps_si512(a); }
  static F cast_f(U a) { return _mm512_castsi512_ps(a); }
  static U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
  static U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  static U and_u(U a, U b) { return _mm512_and_si512(a, b); }
  static U or_u(U a, U b) { return _mm512_or_si512(a, b); }
  static U xor_u(U a, U b) { return _mm512_xor_si512(a, b); }
  template <int kBy>
  static U shl(U a) {
    return _mm512_slli_epi32(a, kBy);
  }
  template <int kBy>
  static U shr(U a) {
    return _mm512_srli_epi32(a, kBy);
  }
  static F to_f(U a) { return _mm512_cvtepi32_ps(a); }
  static U to_i(F a) { return _mm512_cvttps_epi32(a); }
  /// vpermps reads only the low four bits of an index.
  static F lookup16(F table, U index) { return _mm512_permutexvar_ps(index, table); }
  static F lookup8(F table, U index) { return lookup16(table, index); }  // entries repeat
  static U shr_by(U a, int by) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(by)); }
  static U merge_bits(U mask, U a, U b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);  // mask ? a : b
  }
  static F even(F a, F b) {
    const U lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static F odd(F a, F b) {
    const U lanes = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  using H = __m256i;
  static H load_h(const std::uint16_t* p) { return half(p); }
  /// 16 lanes of 16 bits.
  struct Words {
    using U = __m256i;
    static U set1_u(std::uint32_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
    static U load_u8(const std::uint8_t* p) {
      return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    template <int kBy>
    static U shl(U a) {
      return _mm256_slli_epi16(a, kBy);
    }
    static U shr_by(U a, int by) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(by)); }
    static U merge_bits(U mask, U a, U b) { return _mm256_ternarylogic_epi32(mask, a, b, 0xCA); }
  };
  static void lookup_h(std::uint16_t* p, H table, Words::U index) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutexvar_epi16(index, table));
  }
  /// A gather takes twice as long as looking all 16 rows of 16 up.
  static F lookup256(const float* p, U index) {
    const auto of_32 = [&](int k) {
      return _mm512_permutex2var_ps(load(p + 32 * k), index, load(p + 32 * k + 16));
    };
    const M bit5 = _mm512_test_epi32_mask(index, set1_u(32));
    const M bit6 = _mm512_test_epi32_mask(index, set1_u(64));
    const auto of_128 = [&](int k) {
      return select(bit6, select(bit5, of_32(k + 3), of_32(k + 2)),
                    select(bit5, of_32(k + 1), of_32(k)));
    };
    return select(_mm512_test_epi32_mask(index, set1_u(128)), of_128(4), of_128(0));
  }

  // ---- float64
  static D set1_d(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  static D widen(F a) { return {_mm512_cvtps_pd(low(a)), _mm512_cvtps_pd(high(a))}; }
  static F narrow(D a) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo)), _mm512_cvtpd_ps(a.hi),
                              1);
  }
  static D add_d(D a, D b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
  static D sub_d(D a, D b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
  static D mul_d(D a, D b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
  static D div_d(D a, D b) { return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)}; }
  static MD lt_d(D a, D b) {
    return {_mm512_cmp_pd_mask(a.lo, b.lo, _CMP_LT_OQ), _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_LT_OQ)};
  }
  static D select_d(MD m, D a, D b) {
    return {_mm512_mask_blend_pd(m.lo, b.lo, a.lo), _mm512_mask_blend_pd(m.hi, b.hi, a.hi)};
  }
  static double sum_d(D a) {
    const __m512d w8 = _mm512_add_pd(a.lo, a.hi);
    const __m256d w4 = _mm256_add_pd(_mm512_castpd512_pd256(w8), _mm512_extractf64x4_pd(w8, 1));
    const __m128d w2 = _mm_add_pd(_mm256_castpd256_pd128(w4), _mm256_extractf128_pd(w4, 1));
    return _mm_cvtsd_f64(_mm_add_sd(w2, _mm_unpackhi_pd(w2, w2)));
  }
  static L cast_l(D a) { return {_mm512_castpd_si512(a.lo), _mm512_castpd_si512(a.hi)}; }
  static D cast_d(L a) { return {_mm512_castsi512_pd(a.lo), _mm512_castsi512_pd(a.hi)}; }
  static L set1_l(std::int64_t x) { return {_mm512_set1_epi64(x), _mm512_set1_epi64(x)}; }
  static L add_l(L a, L b) { return {_mm512_add_epi64(a.lo, b.lo), _mm512_add_epi64(a.hi, b.hi)}; }
  static L sub_l(L a, L b) { return {_mm512_sub_epi64(a.lo, b.lo), _mm512_sub_epi64(a.hi, b.hi)}; }
  static L and_l(L a, L b) { return {_mm512_and_si512(a.lo, b.lo), _mm512_and_si512(a.hi, b.hi)}; }
  static L or_l(L a, L b) { return {_mm512_or_si512(a.lo, b.lo), _mm512_or_si512(a.hi, b.hi)}; }
  template <int kBy>
  static L shl_l(L a) {
    return {_mm512_slli_epi64(a.lo, kBy), _mm512_slli_epi64(a.hi, kBy)};
  }
  template <int kBy>
  static L shr_l(L a) {
    return {_mm512_srli_epi64(a.lo, kBy), _mm512_srli_epi64(a.hi, kBy)};
  }
  static D to_d(L a) { return {_mm512_cvtepi64_pd(a.lo), _mm512_cvtepi64_pd(a.hi)}; }
  static L rint_l(D a) { return {_mm512_cvtpd_epi64(a.lo), _mm512_cvtpd_epi64(a.hi)}; }
};

}  // namespace
}  // namespace quantal

// 16 lanes on AVX2 + FMA + F16C: two ymm per F and U, four per D and L. Semantics: vec_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct VecAvx2 {
  struct F {
    __m256 lo, hi;
  };
  struct U {
    __m256i lo, hi;
  };
  struct M {
    __m256 lo, hi;
  };
  struct D {
    __m256d a, b, c, d;
  };
  struct L {
    __m256i a, b, c, d;
  };
  using MD = D;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static constexpr int kTileRows = 4;
  static constexpr int kTileInputs = 1;
  static constexpr int kDirectRows = 2;

  // ---- float32: memory
  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
  }
  static U first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)};
  }
  static F load_n(const float* p, int n) {
    const U m = first(n);
    return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
  }
  static void store_n(float* p, F a, int n) {
    const U m = first(n);
    _mm256_maskstore_ps(p, m.lo, a.lo);
    _mm256_maskstore_ps(p + 8, m.hi, a.hi);
  }
  static __m128i load8(const std::uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static void store8(std::uint16_t* p, __m128i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
  }
  static F load_f16(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))};
  }
  static F load_bf16(const std::uint16_t* p) {
    return cast_f(shl<16>({_mm256_cvtepu16_epi32(load8(p)), _mm256_cvtepu16_epi32(load8(p + 8))}));
  }
  static void store_f16(std::uint16_t* p, F a) {
    store8(p, _mm256_cvtps_ph(a.lo, kNearest));
    store8(p + 8, _mm256_cvtps_ph(a.hi, kNearest));
  }
  /// Bits of the nearest bfloat16 in the high half of each lane.
  static __m256i bf16_bits(__m256 a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    const U h = shr<16>({bf16_bits(a.lo), bf16_bits(a.hi)});
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h.lo, h.hi), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  static F round_f16(F a) {
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.lo, kNearest)),
            _mm256_cvtph_ps(_mm256_cvtps_ph(a.hi, kNearest))};
  }
  static F round_bf16(F a) {
    return cast_f(and_u({bf16_bits(a.lo), bf16_bits(a.hi)}, set1_u(0xFFFF0000U)));
  }

  // ---- float32: arithmetic
  static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F abs(F a) { return cast_f(and_u(cast_u(a), set1_u(0x7FFFFFFFU))); }
  static F rint(F a) { return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)}; }
  static M lt(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
  }
  static M le(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
  }
  static M eq(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
  }
  static F select(M m, F a, F b) {
    return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
  }
  static U select_u(M m, U a, U b) { return cast_u(select(m, cast_f(a), cast_f(b))); }
  static bool any(M m) { return (_mm256_movemask_ps(m.lo) | _mm256_movemask_ps(m.hi)) != 0; }
  static float sum(F a) {
    const __m256 w8 = _mm256_add_ps(a.lo, a.hi);
    const __m128 w4 = _mm_add_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_add_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_add_ss(w2, _mm_movehdup_ps(w2)));
  }
  static float reduce_max(F a) {
    const __m256 w8 = _mm256_max_ps(a.lo, a.hi);
    const __m128 w4 = _mm_max_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_max_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_max_ss(w2, _mm_movehdup_ps(w2)));
  }
  static float reduce_min(F a) {
    const __m256 w8 = _mm256_min_ps(a.lo, a.hi);
    const __m128 w4 = _mm_min_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
    const __m128 w2 = _mm_min_ps(w4, _mm_movehl_ps(w4, w4));
    return _mm_cvtss_f32(_mm_min_ss(w2, _mm_movehdup_ps(w2)));
  }

  // ---- uint32 and codes
  static U set1_u(std::uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static U load_u8(const std::uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
  }
  static void store_u8(std::uint8_t* p, U a) {
    const U low = and_u(a, set1_u(0xFFU));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low.lo, low.hi), 0xD8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static U cast_u(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
  static F cast_f(U a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
  static U add_u(U a, U b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static U sub_u(U a, U b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
  static U and_u(U a, U b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static U or_u(U a, U b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  static U xor_u(U a, U b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
  template <int kBy>
  static U shl(U a) {
    return {_mm256_slli_epi32(a.lo, kBy), _mm256_slli_epi32(a.hi, kBy)};
  }
  template <int kBy>
  static U shr(U a) {
    return {_mm256_srli_epi32(a.lo, kBy), _mm256_srli_epi32(a.hi, kBy)};
  }
  static F to_f(U a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static U to_i(F a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
  /// Two lookups among eight, chosen by bit 3 of the index, which a shift makes the blend's sign.
  static __m256 lookup8(F table, __m256i index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, index),
                            _mm256_permutevar8x32_ps(table.hi, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static F lookup16(F table, U index) {
    return {lookup8(table, index.lo), lookup8(table, index.hi)};
  }
  static F lookup8(F table, U index) {
    return {_mm256_permutevar8x32_ps(table.lo, index.lo),
            _mm256_permutevar8x32_ps(table.lo, index.hi)};
  }
  static U shr_by(U a, int by) {
    const __m128i count = _mm_cvtsi32_si128(by);
    return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
  }
  static U merge_bits(U mask, U a, U b) {
    return {_mm256_or_si256(_mm256_and_si256(mask.lo, a.lo), _mm256_andnot_si256(mask.lo, b.lo)),
            _mm256_or_si256(_mm256_and_si256(mask.hi, a.hi), _mm256_andnot_si256(mask.hi, b.hi))};
  }
  /// shuffle_ps works in halves of 128 bits; the permutation puts the four pairs in order.
  template <int kPick>
  static __m256 pick(__m256 a, __m256 b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, kPick));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
  }
  static F even(F a, F b) { return {pick<0x88>(a.lo, a.hi), pick<0x88>(b.lo, b.hi)}; }
  static F odd(F a, F b) { return {pick<0xDD>(a.lo, a.hi), pick<0xDD>(b.lo, b.hi)}; }
  /// Low bytes of the 16 entries and high bytes, each twice.
  struct H {
    __m128i low, high;
  };
  static H load_h(const std::uint16_t* p) {
    const __m128i a = load8(p), b = load8(p + 8);
    const __m128i byte = _mm_set1_epi16(0xFF);
    return {_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)),
            _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
  }
  /// 16 lanes of 8 bits in words of 16: bits of the next lane enter where shifts move them.
  struct Words {
    using U = __m128i;
    static U set1_u(std::uint32_t x) { return _mm_set1_epi8(static_cast<char>(x)); }
    static U load_u8(const std::uint8_t* p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
    /// Bits of the lane before enter below.
    template <int kBy>
    static U shl(U a) {
      return _mm_slli_epi16(a, kBy);
    }
    static U shr_by(U a, int by) { return _mm_srl_epi16(a, _mm_cvtsi32_si128(by)); }
    static U merge_bits(U mask, U a, U b) {
      return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
    }
  };
  static void lookup_h(std::uint16_t* p, H table, Words::U index) {
    const __m128i at = _mm_and_si128(index, _mm_set1_epi8(15));
    const __m128i low = _mm_shuffle_epi8(table.low, at), high = _mm_shuffle_epi8(table.high, at);
    store8(p, _mm_unpacklo_epi8(low, high));
    store8(p + 8, _mm_unpackhi_epi8(low, high));
  }
  static F lookup256(const float* p, U index) {
    return {_mm256_i32gather_ps(p, index.lo, 4), _mm256_i32gather_ps(p, index.hi, 4)};
  }

  // ---- float64
  template <class R, class X, class Fn>
  static R map(X x, Fn fn) {
    return {fn(x.a), fn(x.b), fn(x.c), fn(x.d)};
  }
  template <class R, class X, class Fn>
  static R map(X x, X y, Fn fn) {
    return {fn(x.a, y.a), fn(x.b, y.b), fn(x.c, y.c), fn(x.d, y.d)};
  }
  static __m128 part(__m256 a, int) { return _mm256_extractf128_ps(a, 1); }
  static __m128 part(__m256 a) { return _mm256_castps256_ps128(a); }
  static D set1_d(double x) {
    const __m256d v = _mm256_set1_pd(x);
    return {v, v, v, v};
  }
  static D widen(F x) {
    return {_mm256_cvtps_pd(part(x.lo)), _mm256_cvtps_pd(part(x.lo, 1)),
            _mm256_cvtps_pd(part(x.hi)), _mm256_cvtps_pd(part(x.hi, 1))};
  }
  static F narrow(D x) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(x.b), _mm256_cvtpd_ps(x.a)),
            _mm256_set_m128(_mm256_cvtpd_ps(x.d), _mm256_cvtpd_ps(x.c))};
  }
  static D add_d(D x, D y) {
    return map<D>(x, y, [](__m256d p, __m256d q) { return _mm256_add_pd(p, q); });
  }
  static D sub_d(D x, D y) {
    return map<D>(x, y, [](__m256d p, __m256d q) { return _mm256_sub_pd(p, q); });
  }
  static D mul_d(D x, D y) {
    return map<D>(x, y, [](__m256d p, __m256d q) { return _mm256_mul_pd(p, q); });
  }
  static D div_d(D x, D y) {
    return map<D>(x, y, [](__m256d p, __m256d q) { return _mm256_div_pd(p, q); });
  }
  static MD lt_d(D x, D y) {
    return map<D>(x, y, [](__m256d p, __m256d q) { return _mm256_cmp_pd(p, q, _CMP_LT_OQ); });
  }
  static D select_d(MD m, D x, D y) {
    return {_mm256_blendv_pd(y.a, x.a, m.a), _mm256_blendv_pd(y.b, x.b, m.b),
            _mm256_blendv_pd(y.c, x.c, m.c), _mm256_blendv_pd(y.d, x.d, m.d)};
  }
  static double sum_d(D x) {
    const __m256d w4 = _mm256_add_pd(_mm256_add_pd(x.a, x.c), _mm256_add_pd(x.b, x.d));
    const __m128d w2 = _mm_add_pd(_mm256_castpd256_pd128(w4), _mm256_extractf128_pd(w4, 1));
    return _mm_cvtsd_f64(_mm_add_sd(w2, _mm_unpackhi_pd(w2, w2)));
  }
  static L cast_l(D x) {
    return map<L>(x, [](__m256d p) { return _mm256_castpd_si256(p); });
  }
  static D cast_d(L x) {
    return map<D>(x, [](__m256i p) { return _mm256_castsi256_pd(p); });
  }
  static L set1_l(std::int64_t x) {
    const __m256i v = _mm256_set1_epi64x(x);
    return {v, v, v, v};
  }
  static L add_l(L x, L y) {
    return map<L>(x, y, [](__m256i p, __m256i q) { return _mm256_add_epi64(p, q); });
  }
  static L sub_l(L x, L y) {
    return map<L>(x, y, [](__m256i p, __m256i q) { return _mm256_sub_epi64(p, q); });
  }
  static L and_l(L x, L y) {
    return map<L>(x, y, [](__m256i p, __m256i q) { return _mm256_and_si256(p, q); });
  }
  static L or_l(L x, L y) {
    return map<L>(x, y, [](__m256i p, __m256i q) { return _mm256_or_si256(p, q); });
  }
  template <int kBy>
  static L shl_l(L x) {
    return map<L>(x, [](__m256i p) { return _mm256_slli_epi64(p, kBy); });
  }
  template <int kBy>
  static L shr_l(L x) {
    return map<L>(x, [](__m256i p) { return _mm256_srli_epi64(p, kBy); });
  }
  // 1.5 * 2^52: adding it moves an integer of up to 51 bits into the low mantissa, both ways.
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr std::int64_t kMagicBits = 0x4338000000000000;
  static D to_d(L x) { return sub_d(cast_d(add_l(x, set1_l(kMagicBits))), set1_d(kMagic)); }
  static L rint_l(D x) { return sub_l(cast_l(add_d(x, set1_d(kMagic))), set1_l(kMagicBits)); }
};

}  // namespace
}  // namespace quantal

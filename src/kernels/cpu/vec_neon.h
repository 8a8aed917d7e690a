// 16 lanes on AArch64 NEON: four q registers per F and U, eight per D and L. Semantics:
// vec_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct VecNeon {
  struct F {
    float32x4_t a, b, c, d;
  };
  struct U {
    uint32x4_t a, b, c, d;
  };
  using M = U;
  struct D {
    float64x2_t v[8];
  };
  struct L {
    int64x2_t v[8];
  };
  struct MD {
    uint64x2_t v[8];
  };
  static constexpr int kTileRows = 4;
  static constexpr int kTileInputs = 1;
  static constexpr int kDirectRows = 4;

  template <class R, class X, class Fn>
  static R map(X x, Fn fn) {
    return {fn(x.a), fn(x.b), fn(x.c), fn(x.d)};
  }
  template <class R, class X, class Fn>
  static R map(X x, X y, Fn fn) {
    return {fn(x.a, y.a), fn(x.b, y.b), fn(x.c, y.c), fn(x.d, y.d)};
  }
  template <class R, class X, class Fn>
  static R map8(X x, Fn fn) {
    R r;
    for (int i = 0; i < 8; ++i) r.v[i] = fn(x.v[i]);
    return r;
  }
  template <class R, class X, class Fn>
  static R map8(X x, X y, Fn fn) {
    R r;
    for (int i = 0; i < 8; ++i) r.v[i] = fn(x.v[i], y.v[i]);
    return r;
  }

  // ---- float32: memory
  static F zero() { return set1(0.0F); }
  static F set1(float x) {
    return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)};
  }
  static F load(const float* p) {
    return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
  }
  static void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
  }
  static F load_n(const float* p, int n) {
    float lanes[16] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(float));
    return load(lanes);
  }
  static void store_n(float* p, F x, int n) {
    float lanes[16];
    store(lanes, x);
    __builtin_memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(float));
  }
  static F load_f16(const std::uint16_t* p) {
    const auto part = [p](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))); };
    return {part(0), part(4), part(8), part(12)};
  }
  static F load_bf16(const std::uint16_t* p) {
    const auto part = [p](int i) { return vshll_n_u16(vld1_u16(p + i), 16); };
    return cast_f({part(0), part(4), part(8), part(12)});
  }
  static uint16x4_t to_f16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
  /// Bits of the nearest bfloat16 in the high half of each lane.
  static uint32x4_t bf16_bits(float32x4_t x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7FFF)), odd);
    return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(u, vdupq_n_u32(0x00400000)));
  }
  static void store_f16(std::uint16_t* p, F x) {
    vst1_u16(p, to_f16(x.a));
    vst1_u16(p + 4, to_f16(x.b));
    vst1_u16(p + 8, to_f16(x.c));
    vst1_u16(p + 12, to_f16(x.d));
  }
  static void store_bf16(std::uint16_t* p, F x) {
    vst1_u16(p, vshrn_n_u32(bf16_bits(x.a), 16));
    vst1_u16(p + 4, vshrn_n_u32(bf16_bits(x.b), 16));
    vst1_u16(p + 8, vshrn_n_u32(bf16_bits(x.c), 16));
    vst1_u16(p + 12, vshrn_n_u32(bf16_bits(x.d), 16));
  }
  static F round_f16(F x) {
    return map<F>(x, [](float32x4_t v) { return vcvt_f32_f16(vcvt_f16_f32(v)); });
  }
  static F round_bf16(F x) {
    const uint32x4_t high = vdupq_n_u32(0xFFFF0000U);
    return map<F>(
        x, [high](float32x4_t v) { return vreinterpretq_f32_u32(vandq_u32(bf16_bits(v), high)); });
  }

  // ---- float32: arithmetic
  static F add(F x, F y) {
    return map<F>(x, y, [](auto p, auto q) { return vaddq_f32(p, q); });
  }
  static F sub(F x, F y) {
    return map<F>(x, y, [](auto p, auto q) { return vsubq_f32(p, q); });
  }
  static F mul(F x, F y) {
    return map<F>(x, y, [](auto p, auto q) { return vmulq_f32(p, q); });
  }
  static F div(F x, F y) {
    return map<F>(x, y, [](auto p, auto q) { return vdivq_f32(p, q); });
  }
  static F fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
            vfmaq_f32(z.d, x.d, y.d)};
  }
  static F min(F x, F y) { return select(lt(x, y), x, y); }
  static F max(F x, F y) { return select(lt(y, x), x, y); }
  static F abs(F x) {
    return map<F>(x, [](auto p) { return vabsq_f32(p); });
  }
  static F rint(F x) {
    return map<F>(x, [](auto p) { return vrndnq_f32(p); });
  }
  static M lt(F x, F y) {
    return map<M>(x, y, [](auto p, auto q) { return vcltq_f32(p, q); });
  }
  static M le(F x, F y) {
    return map<M>(x, y, [](auto p, auto q) { return vcleq_f32(p, q); });
  }
  static M eq(F x, F y) {
    return map<M>(x, y, [](auto p, auto q) { return vceqq_f32(p, q); });
  }
  static F select(M m, F x, F y) { return cast_f(select_u(m, cast_u(x), cast_u(y))); }
  static U select_u(M m, U x, U y) {
    return {vbslq_u32(m.a, x.a, y.a), vbslq_u32(m.b, x.b, y.b), vbslq_u32(m.c, x.c, y.c),
            vbslq_u32(m.d, x.d, y.d)};
  }
  static bool any(M m) {
    return vmaxvq_u32(vorrq_u32(vorrq_u32(m.a, m.b), vorrq_u32(m.c, m.d))) != 0;
  }
  template <class Fn>
  static float tree(F x, Fn fn) {
    const float32x4_t w4 = fn(fn(x.a, x.c), fn(x.b, x.d));
    const float32x4_t w2 = fn(w4, vextq_f32(w4, w4, 2));
    return vgetq_lane_f32(fn(w2, vextq_f32(w2, w2, 1)), 0);
  }
  static float sum(F x) {
    return tree(x, [](auto p, auto q) { return vaddq_f32(p, q); });
  }
  static float reduce_max(F x) {
    return tree(x, [](auto p, auto q) { return vmaxq_f32(p, q); });
  }
  static float reduce_min(F x) {
    return tree(x, [](auto p, auto q) { return vminq_f32(p, q); });
  }

  // ---- uint32 and codes
  static U set1_u(std::uint32_t x) {
    return {vdupq_n_u32(x), vdupq_n_u32(x), vdupq_n_u32(x), vdupq_n_u32(x)};
  }
  static U load_u8(const std::uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high)};
  }
  static void store_u8(std::uint8_t* p, U x) {
    const uint16x8_t low = vcombine_u16(vmovn_u32(x.a), vmovn_u32(x.b));
    const uint16x8_t high = vcombine_u16(vmovn_u32(x.c), vmovn_u32(x.d));
    vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
  }
  static U cast_u(F x) {
    return map<U>(x, [](auto p) { return vreinterpretq_u32_f32(p); });
  }
  static F cast_f(U x) {
    return map<F>(x, [](auto p) { return vreinterpretq_f32_u32(p); });
  }
  static U add_u(U x, U y) {
    return map<U>(x, y, [](auto p, auto q) { return vaddq_u32(p, q); });
  }
  static U sub_u(U x, U y) {
    return map<U>(x, y, [](auto p, auto q) { return vsubq_u32(p, q); });
  }
  static U and_u(U x, U y) {
    return map<U>(x, y, [](auto p, auto q) { return vandq_u32(p, q); });
  }
  static U or_u(U x, U y) {
    return map<U>(x, y, [](auto p, auto q) { return vorrq_u32(p, q); });
  }
  static U xor_u(U x, U y) {
    return map<U>(x, y, [](auto p, auto q) { return veorq_u32(p, q); });
  }
  template <int kBy>
  static U shl(U x) {
    return map<U>(x, [](uint32x4_t p) { return vshlq_n_u32(p, kBy); });
  }
  template <int kBy>
  static U shr(U x) {
    return map<U>(x, [](uint32x4_t p) { return vshrq_n_u32(p, kBy); });
  }
  static F to_f(U x) {
    return map<F>(x, [](auto p) { return vcvtq_f32_s32(vreinterpretq_s32_u32(p)); });
  }
  static U to_i(F x) {
    return map<U>(x, [](auto p) { return vreinterpretq_u32_s32(vcvtq_s32_f32(p)); });
  }
  /// The table is 64 bytes; four byte indices 4 i .. 4 i + 3 fetch entry i with one vqtbl4q.
  static F lookup16(F table, U index) {
    const uint8x16x4_t bytes = {vreinterpretq_u8_f32(table.a), vreinterpretq_u8_f32(table.b),
                                vreinterpretq_u8_f32(table.c), vreinterpretq_u8_f32(table.d)};
    return map<F>(index, [&bytes](uint32x4_t i) {
      const uint32x4_t entry = vandq_u32(i, vdupq_n_u32(15));
      const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100U), entry, 0x04040404U);
      return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
    });
  }
  static F lookup8(F table, U index) { return lookup16(table, index); }  // entries repeat
  static U shr_by(U x, int by) {
    const int32x4_t count = vdupq_n_s32(-by);
    return map<U>(x, [count](uint32x4_t p) { return vshlq_u32(p, count); });
  }
  static U merge_bits(U mask, U x, U y) {
    return {vbslq_u32(mask.a, x.a, y.a), vbslq_u32(mask.b, x.b, y.b), vbslq_u32(mask.c, x.c, y.c),
            vbslq_u32(mask.d, x.d, y.d)};
  }
  static F even(F x, F y) {
    return {vuzp1q_f32(x.a, x.b), vuzp1q_f32(x.c, x.d), vuzp1q_f32(y.a, y.b), vuzp1q_f32(y.c, y.d)};
  }
  static F odd(F x, F y) {
    return {vuzp2q_f32(x.a, x.b), vuzp2q_f32(x.c, x.d), vuzp2q_f32(y.a, y.b), vuzp2q_f32(y.c, y.d)};
  }
  /// Low bytes of the 16 entries and high bytes.
  using H = uint8x16x2_t;
  static H load_h(const std::uint16_t* p) {
    return vld2q_u8(reinterpret_cast<const std::uint8_t*>(p));
  }
  /// 16 lanes of 8 bits.
  struct Words {
    using U = uint8x16_t;
    static U set1_u(std::uint32_t x) { return vdupq_n_u8(static_cast<std::uint8_t>(x)); }
    static U load_u8(const std::uint8_t* p) { return vld1q_u8(p); }
    template <int kBy>
    static U shl(U x) {
      return vshlq_n_u8(x, kBy);
    }
    static U shr_by(U x, int by) { return vshlq_u8(x, vdupq_n_s8(static_cast<std::int8_t>(-by))); }
    static U merge_bits(U mask, U x, U y) { return vbslq_u8(mask, x, y); }
  };
  static void lookup_h(std::uint16_t* p, H table, Words::U index) {
    const uint8x16_t at = vandq_u8(index, vdupq_n_u8(15));
    const H out = {{vqtbl1q_u8(table.val[0], at), vqtbl1q_u8(table.val[1], at)}};
    vst2q_u8(reinterpret_cast<std::uint8_t*>(p), out);
  }
  static F lookup256(const float* p, U index) {
    std::uint32_t at[16];
    float lanes[16];
    vst1q_u32(at, index.a);
    vst1q_u32(at + 4, index.b);
    vst1q_u32(at + 8, index.c);
    vst1q_u32(at + 12, index.d);
    for (int i = 0; i < 16; ++i) lanes[i] = p[at[i]];
    return load(lanes);
  }

  // ---- float64: v[0] holds lanes 0 and 1, v[7] lanes 14 and 15
  static D set1_d(double x) {
    D r;
    for (auto& v : r.v) v = vdupq_n_f64(x);
    return r;
  }
  static D widen(F x) {
    return {vcvt_f64_f32(vget_low_f32(x.a)), vcvt_high_f64_f32(x.a),
            vcvt_f64_f32(vget_low_f32(x.b)), vcvt_high_f64_f32(x.b),
            vcvt_f64_f32(vget_low_f32(x.c)), vcvt_high_f64_f32(x.c),
            vcvt_f64_f32(vget_low_f32(x.d)), vcvt_high_f64_f32(x.d)};
  }
  static F narrow(D x) {
    const auto pair = [&x](int i) { return vcvt_high_f32_f64(vcvt_f32_f64(x.v[i]), x.v[i + 1]); };
    return {pair(0), pair(2), pair(4), pair(6)};
  }
  static D add_d(D x, D y) {
    return map8<D>(x, y, [](auto p, auto q) { return vaddq_f64(p, q); });
  }
  static D sub_d(D x, D y) {
    return map8<D>(x, y, [](auto p, auto q) { return vsubq_f64(p, q); });
  }
  static D mul_d(D x, D y) {
    return map8<D>(x, y, [](auto p, auto q) { return vmulq_f64(p, q); });
  }
  static D div_d(D x, D y) {
    return map8<D>(x, y, [](auto p, auto q) { return vdivq_f64(p, q); });
  }
  static MD lt_d(D x, D y) {
    return map8<MD>(x, y, [](auto p, auto q) { return vcltq_f64(p, q); });
  }
  static D select_d(MD m, D x, D y) {
    D r;
    for (int i = 0; i < 8; ++i) r.v[i] = vbslq_f64(m.v[i], x.v[i], y.v[i]);
    return r;
  }
  static double sum_d(D x) {
    const auto w8 = [&x](int i) { return vaddq_f64(x.v[i], x.v[i + 4]); };
    const float64x2_t w2 = vaddq_f64(vaddq_f64(w8(0), w8(2)), vaddq_f64(w8(1), w8(3)));
    return vgetq_lane_f64(w2, 0) + vgetq_lane_f64(w2, 1);
  }
  static L cast_l(D x) {
    return map8<L>(x, [](auto p) { return vreinterpretq_s64_f64(p); });
  }
  static D cast_d(L x) {
    return map8<D>(x, [](auto p) { return vreinterpretq_f64_s64(p); });
  }
  static L set1_l(std::int64_t x) {
    L r;
    for (auto& v : r.v) v = vdupq_n_s64(x);
    return r;
  }
  static L add_l(L x, L y) {
    return map8<L>(x, y, [](auto p, auto q) { return vaddq_s64(p, q); });
  }
  static L sub_l(L x, L y) {
    return map8<L>(x, y, [](auto p, auto q) { return vsubq_s64(p, q); });
  }
  static L and_l(L x, L y) {
    return map8<L>(x, y, [](auto p, auto q) { return vandq_s64(p, q); });
  }
  static L or_l(L x, L y) {
    return map8<L>(x, y, [](auto p, auto q) { return vorrq_s64(p, q); });
  }
  template <int kBy>
  static L shl_l(L x) {
    return map8<L>(x, [](int64x2_t p) { return vshlq_n_s64(p, kBy); });
  }
  template <int kBy>
  static L shr_l(L x) {
    return map8<L>(x, [](int64x2_t p) {
      return vreinterpretq_s64_u64(vshrq_n_u64(vreinterpretq_u64_s64(p), kBy));
    });
  }
  static D to_d(L x) {
    return map8<D>(x, [](auto p) { return vcvtq_f64_s64(p); });
  }
  static L rint_l(D x) {
    return map8<L>(x, [](auto p) { return vcvtnq_s64_f64(p); });
  }
};

}  // namespace
}  // namespace quantal

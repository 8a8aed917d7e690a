// 16 lanes in plain C++: the semantics that every other vec_*.h reproduces bit for bit.
//
// Kernels are written once as templates over a struct of this shape (VecScalar, VecAvx2, VecAvx512,
// VecNeon) and instantiated in one file per instruction set. Everything has internal linkage.
//
//   F  16 float32        M  16-lane condition from comparing F
//   U  16 uint32         D  16 float64       MD condition from comparing D      L  16 int64
//
// Lane order is memory order. Arithmetic rounds to nearest even; fma rounds once; min(a, b) is
// a < b ? a : b and max(a, b) is a > b ? a : b (so b if either is NaN). The bits of a NaN that
// arithmetic produces are unspecified.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct VecScalar {
  struct F {
    float v[16];
  };
  struct U {
    std::uint32_t v[16];
  };
  struct D {
    double v[16];
  };
  struct L {
    std::int64_t v[16];
  };
  struct M {
    bool v[16];
  };
  using MD = M;

  /// Register tile of the products: weight rows x activation rows; weight rows at a time where
  /// codes of few inputs are used without scratch (0: never). No result depends on them.
  static constexpr int kTileRows = 4;
  static constexpr int kTileInputs = 1;
  static constexpr int kDirectRows = 0;

  template <class R, class Fn>
  static R make(Fn fn) {
    R r;
    for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
    return r;
  }

  // ---- float32: memory
  static F zero() { return set1(0.0F); }
  static F set1(float x) {
    return make<F>([&](int) { return x; });
  }
  // Pointers need no alignment: bytes are copied.
  static F load(const float* p) {
    F r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
  /// First n (0..16) lanes; the rest are +0 and no byte beyond them is touched.
  static F load_n(const float* p, int n) {
    F r = {};
    std::memcpy(r.v, p, static_cast<std::size_t>(n) * sizeof(float));
    return r;
  }
  static void store_n(float* p, F a, int n) {
    std::memcpy(p, a.v, static_cast<std::size_t>(n) * sizeof(float));
  }
  struct Halves {
    std::uint16_t v[16];
  };
  static Halves load_halves(const std::uint16_t* p) {
    Halves h;
    std::memcpy(h.v, p, sizeof(h.v));
    return h;
  }
  static F load_f16(const std::uint16_t* p) {
    const Halves h = load_halves(p);
    return make<F>([&](int i) { return f16_to_f32(h.v[i]); });
  }
  static F load_bf16(const std::uint16_t* p) {
    const Halves h = load_halves(p);
    return make<F>([&](int i) { return bf16_to_f32(h.v[i]); });
  }
  static void store_f16(std::uint16_t* p, F a) {
    const Halves h = make<Halves>([&](int i) { return f32_to_f16(a.v[i]); });
    std::memcpy(p, h.v, sizeof(h.v));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    const Halves h = make<Halves>([&](int i) { return f32_to_bf16(a.v[i]); });
    std::memcpy(p, h.v, sizeof(h.v));
  }
  /// Nearest binary16 / bfloat16, widened again.
  static F round_f16(F a) {
    return make<F>([&](int i) { return f16_to_f32(f32_to_f16(a.v[i])); });
  }
  static F round_bf16(F a) {
    return make<F>([&](int i) { return bf16_to_f32(f32_to_bf16(a.v[i])); });
  }

  // ---- float32: arithmetic
  static F add(F a, F b) {
    return make<F>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return make<F>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return make<F>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return make<F>([&](int i) { return a.v[i] / b.v[i]; });
  }
  /// a * b + c, rounded once.
  static F fma(F a, F b, F c) {
    return make<F>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  static F min(F a, F b) {
    return make<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(F a, F b) {
    return make<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(F a) {
    return make<F>([&](int i) { return __builtin_fabsf(a.v[i]); });
  }
  /// Nearest integer, half to even.
  static F rint(F a) {
    return make<F>([&](int i) { return __builtin_rintf(a.v[i]); });
  }
  static M lt(F a, F b) {
    return make<M>([&](int i) { return a.v[i] < b.v[i]; });
  }
  static M le(F a, F b) {
    return make<M>([&](int i) { return a.v[i] <= b.v[i]; });
  }
  static M eq(F a, F b) {
    return make<M>([&](int i) { return a.v[i] == b.v[i]; });
  }
  /// m ? a : b
  static F select(M m, F a, F b) {
    return make<F>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
  }
  static U select_u(M m, U a, U b) {
    return make<U>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
  }
  /// True if any lane is set.
  static bool any(M m) {
    bool r = false;
    for (bool x : m.v) r |= x;
    return r;
  }
  /// Lanes i and i + 8 first, then i and i + 4, i + 2, i + 1.
  static float sum(F a) {
    for (int w = 8; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] = a.v[i] + a.v[i + w];
    return a.v[0];
  }
  /// Largest / smallest lane in the same tree; for numbers only.
  static float reduce_max(F a) {
    for (int w = 8; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
    return a.v[0];
  }
  static float reduce_min(F a) {
    for (int w = 8; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] = a.v[i] < a.v[i + w] ? a.v[i] : a.v[i + w];
    return a.v[0];
  }

  // ---- uint32 and codes
  static U set1_u(std::uint32_t x) {
    return make<U>([&](int) { return x; });
  }
  /// 16 bytes, each zero-extended.
  static U load_u8(const std::uint8_t* p) {
    return make<U>([&](int i) { return p[i]; });
  }
  /// Low byte of each lane.
  static void store_u8(std::uint8_t* p, U a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
  }
  static U cast_u(F a) {
    return make<U>([&](int i) { return std::bit_cast<std::uint32_t>(a.v[i]); });
  }
  static F cast_f(U a) {
    return make<F>([&](int i) { return std::bit_cast<float>(a.v[i]); });
  }
  static U add_u(U a, U b) {
    return make<U>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static U sub_u(U a, U b) {
    return make<U>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static U and_u(U a, U b) {
    return make<U>([&](int i) { return a.v[i] & b.v[i]; });
  }
  static U or_u(U a, U b) {
    return make<U>([&](int i) { return a.v[i] | b.v[i]; });
  }
  static U xor_u(U a, U b) {
    return make<U>([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  template <int kBy>
  static U shl(U a) {
    return make<U>([&](int i) { return a.v[i] << kBy; });
  }
  template <int kBy>
  static U shr(U a) {
    return make<U>([&](int i) { return a.v[i] >> kBy; });
  }
  /// Lanes as int32 to float32.
  static F to_f(U a) {
    return make<F>([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.v[i])); });
  }
  /// Truncation to int32; lanes must be in its range.
  static U to_i(F a) {
    return make<U>(
        [&](int i) { return static_cast<std::uint32_t>(static_cast<std::int32_t>(a.v[i])); });
  }
  /// table[index & 15]
  static F lookup16(F table, U index) {
    return make<F>([&](int i) { return table.v[index.v[i] & 15U]; });
  }
  /// table[index & 7]
  static F lookup8(F table, U index) {
    return make<F>([&](int i) { return table.v[index.v[i] & 7U]; });
  }
  /// a >> by, 0 <= by < 32.
  static U shr_by(U a, int by) {
    return make<U>([&](int i) { return a.v[i] >> by; });
  }
  /// Bits of a where mask is set, of b elsewhere.
  static U merge_bits(U mask, U a, U b) {
    return make<U>([&](int i) { return (a.v[i] & mask.v[i]) | (b.v[i] & ~mask.v[i]); });
  }
  /// Lanes 0, 2, 4 ... of a, then of b; lanes 1, 3, 5 ...
  static F even(F a, F b) {
    return make<F>([&](int i) { return i < 8 ? a.v[2 * i] : b.v[2 * i - 16]; });
  }
  static F odd(F a, F b) {
    return make<F>([&](int i) { return i < 8 ? a.v[2 * i + 1] : b.v[2 * i - 15]; });
  }
  /// A table of 16 elements of 16 bits.
  using H = U;
  static H load_h(const std::uint16_t* p) {
    const Halves h = load_halves(p);
    return make<H>([&](int i) { return h.v[i]; });
  }
  /// 16 lanes of 8 to 16 bits, enough for an index of 4 bits; shifts to the right may leave
  /// anything above the bits that were shifted. Members as in the vector itself.
  using Words = VecScalar;
  /// Stores table[index & 15] of 16 lanes.
  static void lookup_h(std::uint16_t* p, H table, Words::U index) {
    const Halves h =
        make<Halves>([&](int i) { return static_cast<std::uint16_t>(table.v[index.v[i] & 15U]); });
    std::memcpy(p, h.v, sizeof(h.v));
  }
  /// p[index]
  static F lookup256(const float* p, U index) {
    return make<F>([&](int i) { return p[index.v[i]]; });
  }

  // ---- float64
  static D set1_d(double x) {
    return make<D>([&](int) { return x; });
  }
  static D widen(F a) {
    return make<D>([&](int i) { return static_cast<double>(a.v[i]); });
  }
  static F narrow(D a) {
    return make<F>([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static D add_d(D a, D b) {
    return make<D>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static D sub_d(D a, D b) {
    return make<D>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static D mul_d(D a, D b) {
    return make<D>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static D div_d(D a, D b) {
    return make<D>([&](int i) { return a.v[i] / b.v[i]; });
  }
  static MD lt_d(D a, D b) {
    return make<MD>([&](int i) { return a.v[i] < b.v[i]; });
  }
  static D select_d(MD m, D a, D b) {
    return make<D>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
  }
  /// Same tree as sum.
  static double sum_d(D a) {
    for (int w = 8; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] = a.v[i] + a.v[i + w];
    return a.v[0];
  }
  static L cast_l(D a) {
    return make<L>([&](int i) { return std::bit_cast<std::int64_t>(a.v[i]); });
  }
  static D cast_d(L a) {
    return make<D>([&](int i) { return std::bit_cast<double>(a.v[i]); });
  }
  static L set1_l(std::int64_t x) {
    return make<L>([&](int) { return x; });
  }
  static std::int64_t wrap(std::uint64_t x) { return static_cast<std::int64_t>(x); }
  static std::uint64_t bits(std::int64_t x) { return static_cast<std::uint64_t>(x); }
  static L add_l(L a, L b) {
    return make<L>([&](int i) { return wrap(bits(a.v[i]) + bits(b.v[i])); });
  }
  static L sub_l(L a, L b) {
    return make<L>([&](int i) { return wrap(bits(a.v[i]) - bits(b.v[i])); });
  }
  static L and_l(L a, L b) {
    return make<L>([&](int i) { return a.v[i] & b.v[i]; });
  }
  static L or_l(L a, L b) {
    return make<L>([&](int i) { return a.v[i] | b.v[i]; });
  }
  template <int kBy>
  static L shl_l(L a) {
    return make<L>([&](int i) { return wrap(bits(a.v[i]) << kBy); });
  }
  /// Logical shift.
  template <int kBy>
  static L shr_l(L a) {
    return make<L>([&](int i) { return wrap(bits(a.v[i]) >> kBy); });
  }
  /// |a| < 2^51 only, on every instruction set.
  static D to_d(L a) {
    return make<D>([&](int i) { return static_cast<double>(a.v[i]); });
  }
  /// Nearest integer, half to even; |a| < 2^51 only.
  static L rint_l(D a) {
    return make<L>([&](int i) { return static_cast<std::int64_t>(__builtin_rint(a.v[i])); });
  }
};

}  // namespace
}  // namespace quantal

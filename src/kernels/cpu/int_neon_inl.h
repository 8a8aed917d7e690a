// Integers of 4 weight rows on AArch64 NEON, all but the dot product (int_inl.h).
#pragma once

#include "kernels/cpu/int_inl.h"
#include "kernels/cpu/vec_neon.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

struct IntNeon {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kInputs = 8;
  static constexpr bool kHoldSums = false;
  static constexpr int kDirectInputs = 0;
  static constexpr bool kCopyUnits = false;
  static constexpr bool kHalves = false;
  static constexpr bool kSigned = true;

  static I load_i(const std::int32_t* p) { return vld1q_s32(p); }
  static void store_i(std::int32_t* p, I a) { vst1q_s32(p, a); }
  static I set1_i(std::int32_t x) { return vdupq_n_s32(x); }
  static I add_i(I a, I b) { return vaddq_s32(a, b); }
  static I and_i(I a, I b) { return vandq_s32(a, b); }
  static I or_i(I a, I b) { return vorrq_s32(a, b); }
  static I xor_i(I a, I b) { return veorq_s32(a, b); }
  template <int kBy>
  static I shift(I a) {
    const uint32x4_t u = vreinterpretq_u32_s32(a);
    if constexpr (kBy > 0) return vreinterpretq_s32_u32(vshrq_n_u32(u, kBy));
    if constexpr (kBy < 0) return vreinterpretq_s32_u32(vshlq_n_u32(u, -kBy));
    return a;
  }
  static int8x16_t bytes(I a) { return vreinterpretq_s8_s32(a); }
  static I load_levels(const std::uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I lookup(I levels, I index) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(bytes(levels), vreinterpretq_u8_s32(index)));
  }

  static F load_f(const float* p) { return vld1q_f32(p); }
  static void store_f(float* p, F a) { vst1q_f32(p, a); }
  static F set1_f(float x) { return vdupq_n_f32(x); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F to_f(I a) { return vcvtq_f32_s32(a); }
  static F cast_f(I a) { return vreinterpretq_f32_s32(a); }

  static I load_words(const std::uint8_t* p, std::int64_t n) {
    if (n >= 4) return vreinterpretq_s32_u8(vld1q_u8(p));
    std::int32_t words[4] = {};
    if (n > 0) __builtin_memcpy(words, p, static_cast<std::size_t>(4 * n));
    return vld1q_s32(words);
  }
  static void transpose(const std::uint8_t* const* rows, std::int64_t offset, std::int64_t n,
                        I* out) {
    const int32x4x2_t a =
        vtrnq_s32(load_words(rows[0] + offset, n), load_words(rows[1] + offset, n));
    const int32x4x2_t b =
        vtrnq_s32(load_words(rows[2] + offset, n), load_words(rows[3] + offset, n));
    for (int i = 0; i < 2; ++i) {  // words i and i + 2 of rows 0, 1 and of rows 2, 3
      out[i] = vcombine_s32(vget_low_s32(a.val[i]), vget_low_s32(b.val[i]));
      out[i + 2] = vcombine_s32(vget_high_s32(a.val[i]), vget_high_s32(b.val[i]));
    }
  }
};

}  // namespace
}  // namespace quantal

// Integer weights as pairs of 16-bit floats, without float32 on the way: for forms whose scales,
// offsets and values all have the type of the activations. Every step is an operation of that type,
// rounded as r() of quantal::Offset rounds it. A weight costs about one integer instruction and one
// and a half of 16-bit floats; through float32 it costs eight and more.
#pragma once

#include "kernels/cuda/decode_inl.h"

namespace quantal::cuda {

/// Largest width: a code has to fit below the lowest bit of bfloat16's 128.
inline constexpr int kMaxHalfBits = 6;
inline constexpr float kMaxHalfCentre = 64.0F;

/// Whether halves_of_chunk gives the values of `w`.
inline bool decodes_to_halves(const Matrix& w, FloatKind kind) {
  const bool one_type = w.value_kind == kind && w.scale == static_cast<ScaleKind>(kind);
  return one_type && kind != FloatKind::kF32 && w.values == Values::kNumber &&
         w.bits <= kMaxHalfBits && w.centre >= 0 && w.centre <= kMaxHalfCentre &&
         w.offset != OffsetKind::kOver127;
}

/// value = r(r(number * factor + term) * second_factor + second_term), the same in both halves.
struct HalfRule {
  std::uint32_t factor, term, second_factor, second_term;
};

/// What the rules of all groups of a matrix share. A rule is made without branches: the statistics
/// go through masks.
struct HalfForm {
  std::uint32_t minus_origin;  ///< of half_numbers
  std::uint32_t zero_first;    ///< all ones: the offset enters before the scale
  std::uint32_t flip;          ///< sign bits where the offset is subtracted or there is none
};
template <FloatKind kKind>
QUANTAL_HD HalfForm half_form(const Matrix& w) {
  const float base = kKind == FloatKind::kF16 ? 1024.0F : 128.0F;
  return {twice(half_of<kKind>(-(base + w.centre))),
          w.offset == OffsetKind::kZeroPoint ? 0xFFFFFFFFU : 0U,
          w.offset == OffsetKind::kBias ? 0U : 0x80008000U};
}

/// A stored scale and offset of 16 bits (0 where none is), loaded and not yet used.
struct RawHalves {
  std::uint32_t scale, offset;
};
QUANTAL_HD std::uint32_t load_half(const std::uint16_t* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}
QUANTAL_HD RawHalves load_halves(const Matrix& w, const RowStart& row, std::uint32_t slot) {
  const auto* stats = reinterpret_cast<const std::uint16_t*>(row.stats);
  RawHalves raw{load_half(stats + slot), 0};
  if (w.has_offsets) raw.offset = load_half(stats + w.slots + slot);
  return raw;
}

template <FloatKind kKind>
QUANTAL_HD HalfRule half_rule(const HalfForm& form, const RawHalves& raw) {
  constexpr std::uint32_t kOne = twice(kKind == FloatKind::kF16 ? 0x3C00U : 0x3F80U);
  constexpr std::uint32_t kNothing = 0x80008000U;  // -0: x + -0 is x
  const std::uint32_t scale = twice(raw.scale), offset = twice(raw.offset) ^ form.flip;
  const auto either = [&form](std::uint32_t zero_first, std::uint32_t scale_first) {
    return (zero_first & form.zero_first) | (scale_first & ~form.zero_first);
  };
  return {either(kOne, scale), either(offset, kNothing), either(scale, kOne),
          either(kNothing, offset)};
}

/// Bytes 0 and 1 (first = 0) or 2 and 3 of a word, each below a byte of `high`.
QUANTAL_HD std::uint32_t below(std::uint32_t word, std::uint32_t high, int first) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, high, first == 0 ? 0x4140U : 0x4342U);
#else
  const std::uint32_t two = first == 0 ? word : word >> 16;
  return (two & 0xFFU) | (two & 0xFF00U) << 8 | (high & 0xFFU) << 8 | (high & 0xFFU) << 24;
#endif
}

/// number = code - centre of four codes in order: 1024 + code and 128 + code are patterns 0x64xx
/// and 0x43xx, and the difference is exact.
template <FloatKind kKind>
QUANTAL_HD void half_numbers(std::uint32_t codes, std::uint32_t minus_origin,
                             std::uint32_t out[2]) {
  constexpr bool kF16 = kKind == FloatKind::kF16;
  constexpr std::uint32_t kHigh = kF16 ? 0x64646464U : 0x43434343U;
  constexpr std::uint32_t kOne = twice(kF16 ? 0x3C00U : 0x3F80U);
  QUANTAL_UNROLL
  for (int i = 0; i < 2; ++i) out[i] = pair_fma<kKind>(below(codes, kHigh, i), kOne, minus_origin);
}

/// 16 values in order.
template <FloatKind kKind>
QUANTAL_HD void halves_of_chunk(const Codes16& codes, std::uint32_t minus_origin,
                                const HalfRule& rule, std::uint32_t out[kChunk / 2]) {
  QUANTAL_UNROLL
  for (int k = 0; k < 4; ++k) {
    std::uint32_t numbers[2];
    half_numbers<kKind>(codes.w[k], minus_origin, numbers);
    QUANTAL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t v = pair_fma<kKind>(numbers[i], rule.factor, rule.term);
      out[2 * k + i] = pair_fma<kKind>(v, rule.second_factor, rule.second_term);
    }
  }
}

}  // namespace quantal::cuda

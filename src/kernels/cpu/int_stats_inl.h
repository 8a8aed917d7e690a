// Statistics of weight rows for products in which a lane is a row: integer ones (int_kernels.h) and
// those of lanes_avx512bf16.cpp.
#pragma once

#include "kernels/cpu/int_codes_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Scales times `unit` and offsets as they are added (A and B in int_kernels.h), a slot at a time
/// for V::kLanes rows.
template <class T, class V>
class IntSlots {
 public:
  using I = typename V::I;
  using F = typename V::F;
  using Rows = const std::uint8_t* const*;

  IntSlots(const KernelMatrix& w, float unit)
      : w_(w),
        unit_(unit),
        stored_(V::kHalves && !w.has_header &&
                (is_float_scale(w.scale)
                     ? w.slots * scale_bytes(w.scale) % 4 == 0
                     : is_super(w.scale) && w.slots % 4 == 0 && w.nested_slots % 2 == 0 &&
                           w.nested_group_size % 4 == 0)) {}

  /// a[slot * kRows + r] and, if there are offsets, b of columns [c, c + n) of rows row + r, none
  /// beyond row + rows - 1, which is repeated, and of some more slots. Returns the position of c in
  /// slot 0.
  template <std::int64_t kRows>
  std::int64_t fill(std::int64_t row, std::int64_t rows, std::int64_t c, std::int64_t n, float* a,
                    float* b) const {
    std::int64_t position = 0;
    for (std::int64_t at = 0; at < kRows; at += V::kLanes) {
      Put<kRows> put{a + at, b + at, w_.has_offsets};
      if (!stored_) {
        position = expanded(row + at, row + rows - 1, c, n, put);
        continue;
      }
      const std::uint8_t* stats[V::kLanes];
      for (std::int64_t r = 0; r < V::kLanes; ++r) {
        stats[r] = w_.stats + (row + min64(at + r, rows - 1)) * w_.stat_bytes;
      }
      const std::int64_t first = c / w_.group_size / in_word() * in_word();
      for (std::int64_t s = first; s <= (c + n - 1) / w_.group_size; s += V::kLanes * in_word()) {
        words(stats, s, put);
      }
      position = c - first * w_.group_size;
    }
    return position;
  }

 private:
  /// Stores A and B of one slot after the other.
  template <std::int64_t kRows>
  struct Put {
    float* a;
    float* b;
    bool offsets;
    [[gnu::always_inline]] void operator()(F scale, F offset) {
      V::store_f(a, scale);
      if (offsets) V::store_f(b, offset);
      a += kRows;
      b += kRows;
    }
  };

  std::int64_t in_word() const { return 4 / scale_bytes(w_.scale); }

  /// fn(a, b) of the slots of V::kLanes words from `slot` on, a multiple of in_word(). What comes
  /// beyond the row is unspecified. fn is copied and assigned.
  template <class Fn>
  [[gnu::always_inline]] void words(Rows stats, std::int64_t slot, Fn& fn) const {
    const std::int64_t size = scale_bytes(w_.scale), offset = slot * size;
    const std::int64_t n = (w_.slots * size - offset) / 4, second = w_.slots * size + offset;
    switch (w_.scale) {
      case ScaleKind::kF32:
        return transposed<ScaleKind::kF32>(stats, offset, stats, second, n, fn);
      case ScaleKind::kF16:
        return transposed<ScaleKind::kF16>(stats, offset, stats, second, n, fn);
      case ScaleKind::kSuperU8:
        return supers<SubCode::kUnsigned>(stats, slot, fn);
      case ScaleKind::kSuperI8:
        return supers<SubCode::kSigned>(stats, slot, fn);
      case ScaleKind::kSuperU4:
        return supers<SubCode::kLowNibble>(stats, slot, fn);
      default:
        return transposed<ScaleKind::kBF16>(stats, offset, stats, second, n, fn);
    }
  }

  /// fn(a, b) of all slots of columns [c, c + n) of rows [row, row + V::kLanes), none beyond
  /// `last`, which is repeated, and of some more. Returns the position of c in the first slot.
  template <class Fn>
  std::int64_t expanded(std::int64_t row, std::int64_t last, std::int64_t c, std::int64_t n,
                        Fn& fn) const {
    Stretch stats[V::kLanes];
    const std::uint8_t* scales[V::kLanes];
    const std::uint8_t* offsets[V::kLanes];
    for (std::int64_t r = 0; r < V::kLanes; ++r) {
      expand_stretch<T>(w_, min64(row + r, last), c, n, stats[r]);
      scales[r] = reinterpret_cast<const std::uint8_t*>(stats[r].scale);
      offsets[r] = reinterpret_cast<const std::uint8_t*>(stats[r].offset);
    }
    const std::int64_t slots = (stats[0].phase + n - 1) / w_.group_size + 1;
    for (std::int64_t s = 0; s < slots; s += V::kLanes) {
      transposed<ScaleKind::kF32>(scales, 4 * s, offsets, 4 * s, V::kLanes, fn);
    }
    return stats[0].phase;
  }

  template <ScaleKind kScale, class Fn>
  [[gnu::always_inline]] void transposed(Rows scales, std::int64_t scale_at, Rows offsets,
                                         std::int64_t offset_at, std::int64_t words, Fn& fn) const {
    with_offset([&](auto offset) {
      each<kScale, decltype(offset)::kKind>(scales, scale_at, offsets, offset_at, words, fn);
    });
  }
  static bool is_super(ScaleKind s) {
    return s == ScaleKind::kSuperU8 || s == ScaleKind::kSuperI8 || s == ScaleKind::kSuperU4;
  }
  template <class Fn>
  [[gnu::always_inline]] void with_offset(Fn fn) const {
    with_stored_offset(w_.has_offsets ? w_.offset : OffsetKind::kNone, fn);
  }
  /// fn of one slot.
  template <OffsetKind kOffset, class Fn>
  [[gnu::always_inline]] void slot(F scale, F b, Fn& fn) const {
    if constexpr (kOffset == OffsetKind::kShift || kOffset == OffsetKind::kZeroPoint) {
      b = V::mul(b, V::set1_f(-1.0F));
    }
    if constexpr (kOffset == OffsetKind::kZeroPoint) b = V::mul(b, scale);
    fn(V::mul(scale, V::set1_f(unit_)), b);
  }

  template <ScaleKind kScale, OffsetKind kOffset, class Fn>
  void each(Rows scales, std::int64_t scale_at, Rows offsets, std::int64_t offset_at,
            std::int64_t words, Fn& fn) const {
    constexpr bool kOffsets = kOffset != OffsetKind::kNone;
    I s[V::kLanes];
    I o[V::kLanes];
    V::transpose(scales, scale_at, words, s);
    if constexpr (kOffsets) V::transpose(offsets, offset_at, words, o);
    Fn local = fn;  // stores of vectors may alias all that is in memory
    for (std::int64_t i = 0; i < V::kLanes; ++i) {
      const I other = kOffsets ? o[i] : s[i];
      if constexpr (kScale == ScaleKind::kF32) {
        slot<kOffset>(V::cast_f(s[i]), V::cast_f(other), local);
      } else if constexpr (V::kHalves) {
        constexpr bool kF16 = kScale == ScaleKind::kF16;
        slot<kOffset>(V::low_half(kF16, s[i]), V::low_half(kF16, other), local);
        slot<kOffset>(V::high_half(kF16, s[i]), V::high_half(kF16, other), local);
      }
    }
    fn = local;
  }

  /// Sub-codes of super-blocks (expand_supers in stats_inl.h), V::kLanes words of four.
  template <SubCode kSub, class Fn>
  [[gnu::always_inline]] void supers(Rows stats, std::int64_t first, Fn& fn) const {
    if constexpr (V::kHalves) {
      with_offset(
          [&](auto offset) { each_super<kSub, decltype(offset)::kKind>(stats, first, fn); });
    }
  }
  template <SubCode kSub, OffsetKind kOffset, class Fn>
  void each_super(Rows stats, std::int64_t first, Fn& fn) const {
    constexpr bool kOffsets = kOffset != OffsetKind::kNone, kNibbles = kSub == SubCode::kLowNibble;
    const std::int64_t words = (w_.slots - first) / 4, block = first / w_.nested_group_size / 2 * 2;
    const std::int64_t outer = (kOffsets && !kNibbles ? 2 : 1) * w_.slots + 2 * block;
    const std::int64_t outer_words = (w_.nested_slots - block) / 2;
    I code[V::kLanes], super[V::kLanes];
    I offset_code[V::kLanes], offset_super[V::kLanes];
    V::transpose(stats, first, words, code);
    V::transpose(stats, outer, outer_words, super);
    if constexpr (kOffsets) {
      if constexpr (!kNibbles) V::transpose(stats, w_.slots + first, words, offset_code);
      V::transpose(stats, outer + 2 * w_.nested_slots, outer_words, offset_super);
    }
    const auto half = [](const I* halves, std::int64_t j) {
      return j % 2 == 0 ? V::low_half(true, halves[j / 2]) : V::high_half(true, halves[j / 2]);
    };
    Fn local = fn;  // stores of vectors may alias all that is in memory
    for (std::int64_t i = 0; i < V::kLanes; ++i) {
      const auto at = static_cast<std::uint32_t>(first + 4 * i);  // faster than 64 bits
      const std::int64_t j = at / static_cast<std::uint32_t>(w_.nested_group_size) - block;
      const F scale = half(super, j);
      F shift = scale;
      I other = code[i];
      if constexpr (kOffsets) {
        shift = half(offset_super, j);
        other = kNibbles ? V::template shift<4>(code[i]) : offset_code[i];
      }
      super_slot<kSub, kOffset, 0>(scale, code[i], shift, other, local);
      super_slot<kSub, kOffset, 8>(scale, code[i], shift, other, local);
      super_slot<kSub, kOffset, 16>(scale, code[i], shift, other, local);
      super_slot<kSub, kOffset, 24>(scale, code[i], shift, other, local);
    }
    fn = local;
  }
  /// fn of the slot whose codes are kAt bits up in their words.
  template <SubCode kSub, OffsetKind kOffset, int kAt, class Fn>
  [[gnu::always_inline]] void super_slot(F scale, I code, F shift, I other, Fn& fn) const {
    constexpr SubCode kOther = kSub == SubCode::kLowNibble ? kSub : SubCode::kUnsigned;
    slot<kOffset>(V::mul(scale, sub_code<kSub>(V::template shift<kAt>(code))),
                  V::mul(shift, sub_code<kOther>(V::template shift<kAt>(other))), fn);
  }
  /// The low byte of a word, or its low four bits.
  template <SubCode kSub>
  static F sub_code(I word) {
    I code = V::and_i(word, V::set1_i(kSub == SubCode::kLowNibble ? 15 : 255));
    if constexpr (kSub == SubCode::kSigned) {
      code = V::add_i(V::xor_i(code, V::set1_i(0x80)), V::set1_i(-0x80));
    }
    return V::to_f(code);
  }

  const KernelMatrix& w_;
  const float unit_;
  const bool stored_;  // statistics fill whole 32-bit words of a row: `words` takes them
};

}  // namespace
}  // namespace quantal

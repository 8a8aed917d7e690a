// Statistics of weight rows for integer products (int_kernels.h), a lane per row.
#pragma once

#include "kernels/cpu/int_codes_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// A and B of IntKernels' formula, a slot at a time for V::kLanes rows.
template <class T, class V>
class IntSlots {
 public:
  using I = typename V::I;
  using F = typename V::F;
  using Rows = const std::uint8_t* const*;

  IntSlots(const KernelMatrix& w, const IntForm& form)
      : w_(w),
        unit_(form.unit),
        stored_(V::kHalves && !w.has_header &&
                (is_float_scale(w.scale)
                     ? w.slots * scale_bytes(w.scale) % 4 == 0
                     : is_super(w.scale) && w.slots % 4 == 0 && w.nested_slots % 2 == 0 &&
                           w.nested_group_size % 4 == 0)) {}

  /// True if statistics fill whole 32-bit words of a row: `words` takes them.
  bool stored() const { return stored_; }
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

 private:
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
      const std::int64_t j = (first + 4 * i) / w_.nested_group_size - block;
      const F scale = half(super, j);
      F shift = scale;
      I other = code[i];
      if constexpr (kOffsets) {
        shift = half(offset_super, j);
        other = kNibbles ? V::template shift<4>(code[i]) : offset_code[i];
      }
      const auto four = [&](I scales, I offsets) {
        constexpr SubCode kOther = kNibbles ? kSub : SubCode::kUnsigned;
        slot<kOffset>(V::mul(scale, sub_code<kSub>(scales)),
                      V::mul(shift, sub_code<kOther>(offsets)), local);
      };
      four(code[i], other);
      four(V::template shift<8>(code[i]), V::template shift<8>(other));
      four(V::template shift<16>(code[i]), V::template shift<16>(other));
      four(V::template shift<24>(code[i]), V::template shift<24>(other));
    }
    fn = local;
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
  const bool stored_;
};

}  // namespace
}  // namespace quantal

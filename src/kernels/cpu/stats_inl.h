// Statistics of a stretch of one row as float32, for any vector type T (vec_*.h), and the values
// that codes have under them (quantal::Offset).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/planes.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr std::int64_t kLanes = 16;
/// Columns decoded per expansion of statistics where groups are whole vectors of codes, and else.
constexpr std::int64_t kStretch = 4096;
constexpr std::int64_t kShortStretch = 256;
constexpr std::int64_t kStretchSlots = kShortStretch + 1;
static_assert(kStretch / kLanes < kStretchSlots);

constexpr std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

/// float32 statistics of the groups that a stretch touches; offsets are unset without an offset.
/// Up to 15 elements beyond the last are overwritten.
struct Stretch {
  float scale[kStretchSlots + kLanes];
  float offset[kStretchSlots + kLanes];
  std::int64_t phase;  // position of the first column in its group
};

// ------------------------------------------------------------------ values

template <class T, FloatKind kKind>
typename T::F round_value(typename T::F v) {
  if constexpr (kKind == FloatKind::kF16) return T::round_f16(v);
  if constexpr (kKind == FloatKind::kBF16) return T::round_bf16(v);
  return v;
}

/// The value of a mapped code under a scale and an offset, each step rounded (quantal::Offset).
template <class T, OffsetKind kOffset, FloatKind kKind>
typename T::F finish(typename T::F c, typename T::F s, typename T::F o) {
  if constexpr (kOffset == OffsetKind::kZeroPoint) {
    return round_value<T, kKind>(T::mul(round_value<T, kKind>(T::sub(c, o)), s));
  }
  const typename T::F scaled = round_value<T, kKind>(T::mul(c, s));
  if constexpr (kOffset == OffsetKind::kBias) return round_value<T, kKind>(T::add(scaled, o));
  if constexpr (kOffset == OffsetKind::kShift) return round_value<T, kKind>(T::sub(scaled, o));
  if constexpr (kOffset == OffsetKind::kOver127) {
    return round_value<T, kKind>(T::mul(scaled, T::set1(kOneOver127)));
  }
  return scaled;
}

/// A rule that turns mapped codes into values, as a type.
template <OffsetKind kOffsetKind, FloatKind kValueKind>
struct Rule {
  static constexpr OffsetKind kOffset = kOffsetKind;
  static constexpr FloatKind kKind = kValueKind;
  template <class T>
  static typename T::F value(typename T::F c, typename T::F s, typename T::F o) {
    return finish<T, kOffset, kKind>(c, s, o);
  }
};

template <OffsetKind kOffset, class Fn>
void with_kind(const KernelMatrix& w, Fn& fn) {
  switch (w.value_kind) {
    case FloatKind::kF32:
      return fn(Rule<kOffset, FloatKind::kF32>{});
    case FloatKind::kF16:
      return fn(Rule<kOffset, FloatKind::kF16>{});
    case FloatKind::kBF16:
      return fn(Rule<kOffset, FloatKind::kBF16>{});
  }
}

/// Calls fn(Rule) with the rule of this matrix.
template <class Fn>
void with_rule(const KernelMatrix& w, Fn fn) {
  switch (w.offset) {
    case OffsetKind::kNone:
      return with_kind<OffsetKind::kNone>(w, fn);
    case OffsetKind::kBias:
      return with_kind<OffsetKind::kBias>(w, fn);
    case OffsetKind::kShift:
      return with_kind<OffsetKind::kShift>(w, fn);
    case OffsetKind::kZeroPoint:
      return with_kind<OffsetKind::kZeroPoint>(w, fn);
    case OffsetKind::kOver127:
      return with_kind<OffsetKind::kOver127>(w, fn);
  }
}

/// An offset that is stored, as a type.
template <OffsetKind kOffset>
struct StoredOffset {
  static constexpr OffsetKind kKind = kOffset;
};

/// Calls fn(StoredOffset); kNone also for the rule that stores none.
template <class Fn>
[[gnu::always_inline]] inline void with_stored_offset(OffsetKind offset, Fn fn) {
  switch (offset) {
    case OffsetKind::kBias:
      return fn(StoredOffset<OffsetKind::kBias>{});
    case OffsetKind::kShift:
      return fn(StoredOffset<OffsetKind::kShift>{});
    case OffsetKind::kZeroPoint:
      return fn(StoredOffset<OffsetKind::kZeroPoint>{});
    default:
      return fn(StoredOffset<OffsetKind::kNone>{});
  }
}

/// E4M3 codes (low 8 bits, the rest 0) to float32. Adding 120 to the exponent field rebiases it;
/// exponent 0 has no hidden one, which is taken off again by an exact subtraction.
template <class T>
typename T::F e4m3(typename T::U code) {
  const typename T::U sign = T::template shl<24>(T::and_u(code, T::set1_u(0x80)));
  const typename T::U magnitude = T::template shl<20>(T::and_u(code, T::set1_u(0x7F)));
  const typename T::F normal = T::cast_f(T::add_u(magnitude, T::set1_u(120U << 23)));
  const typename T::F tiny =
      T::sub(T::cast_f(T::add_u(magnitude, T::set1_u(121U << 23))), T::set1(0x1p-6F));
  typename T::F v = T::select(T::lt(normal, T::set1(0x1p-6F)), tiny, normal);
  v = T::select(T::eq(normal, T::set1(480.0F)), T::cast_f(T::set1_u(0x7FC00000)), v);
  return T::cast_f(T::or_u(T::cast_u(v), sign));
}

/// E5M2 codes to float32, as e4m3; the largest exponent becomes float32's, for infinity and NaN.
template <class T>
typename T::F e5m2(typename T::U code) {
  const typename T::U sign = T::template shl<24>(T::and_u(code, T::set1_u(0x80)));
  const typename T::U magnitude = T::template shl<21>(T::and_u(code, T::set1_u(0x7F)));
  const typename T::U rebiased = T::add_u(magnitude, T::set1_u(112U << 23));
  const typename T::F normal = T::cast_f(rebiased);
  const typename T::F tiny =
      T::sub(T::cast_f(T::add_u(magnitude, T::set1_u(113U << 23))), T::set1(0x1p-14F));
  typename T::F v = T::select(T::lt(normal, T::set1(0x1p-14F)), tiny, normal);
  const typename T::F special = T::cast_f(T::or_u(rebiased, T::set1_u(0x7F800000)));
  v = T::select(T::lt(normal, T::set1(65536.0F)), v, special);
  return T::cast_f(T::or_u(T::cast_u(v), sign));
}

// ------------------------------------------------------------------ loads and stores by kind

constexpr std::int64_t float_bytes(FloatKind kind) { return kind == FloatKind::kF32 ? 4 : 2; }

template <FloatKind kKind>
const std::uint8_t* element(const void* data, std::int64_t i) {
  return static_cast<const std::uint8_t*>(data) + i * float_bytes(kKind);
}

/// Calls fn with the kind as a template argument.
template <class Fn>
void with_element(FloatKind kind, Fn fn) {
  switch (kind) {
    case FloatKind::kF32:
      return fn.template operator()<FloatKind::kF32>();
    case FloatKind::kF16:
      return fn.template operator()<FloatKind::kF16>();
    case FloatKind::kBF16:
      return fn.template operator()<FloatKind::kBF16>();
  }
}

template <class T>
typename T::F load_kind(FloatKind kind, const void* p) {
  if (kind == FloatKind::kF32) return T::load(static_cast<const float*>(p));
  const auto* halves = static_cast<const std::uint16_t*>(p);
  return kind == FloatKind::kF16 ? T::load_f16(halves) : T::load_bf16(halves);
}

/// n <= 16 elements; nothing is read beyond them.
template <class T>
typename T::F load_kind_n(FloatKind kind, const std::uint8_t* p, std::int64_t n) {
  if (n >= kLanes) return load_kind<T>(kind, p);
  alignas(64) std::uint8_t bytes[64] = {};
  __builtin_memcpy(bytes, p, static_cast<std::size_t>(n * float_bytes(kind)));
  return load_kind<T>(kind, bytes);
}

/// The first n <= 16 lanes.
template <class T>
void store_kind_n(FloatKind kind, typename T::F v, void* p, std::int64_t n) {
  if (kind == FloatKind::kF32) return T::store_n(static_cast<float*>(p), v, static_cast<int>(n));
  std::uint16_t halves[kLanes];
  kind == FloatKind::kF16 ? T::store_f16(halves, v) : T::store_bf16(halves, v);
  __builtin_memcpy(p, halves, static_cast<std::size_t>(n * 2));
}

// ------------------------------------------------------------------ scales of row runs

/// n one-byte codes, or 16 where the buffer goes on far enough.
template <class T>
typename T::U load_codes(const KernelMatrix& w, const std::uint8_t* from, std::int64_t n) {
  if (w.stats_end - from >= kLanes) return T::load_u8(from);
  std::uint8_t bytes[kLanes] = {};
  __builtin_memcpy(bytes, from, static_cast<std::size_t>(min64(kLanes, n)));
  return T::load_u8(bytes);
}

/// One-byte float scales: r(2^(u - 127)) or r(E4M3). Code 0 of E8M0 is a subnormal of float32.
template <class T>
typename T::F byte_scale(const KernelMatrix& w, typename T::U code) {
  typename T::F v;
  if (w.scale == ScaleKind::kE4M3) {
    v = e4m3<T>(code);
  } else {
    v = T::cast_f(T::select_u(T::eq(T::to_f(code), T::zero()), T::set1_u(0x00400000),
                              T::template shl<23>(code)));
  }
  if (w.value_kind == FloatKind::kF16) return T::round_f16(v);
  return w.value_kind == FloatKind::kBF16 ? T::round_bf16(v) : v;
}

constexpr bool is_float_scale(ScaleKind s) { return static_cast<int>(s) <= 2; }
constexpr std::int64_t scale_bytes(ScaleKind s) {
  return is_float_scale(s) ? float_bytes(static_cast<FloatKind>(s)) : 1;
}

/// `count` scales or offsets that stand for themselves. Whole vectors are read wherever the buffer
/// goes on far enough.
template <class T>
void expand_plain(const KernelMatrix& w, const std::uint8_t* from, std::int64_t count, float* to) {
  if (!is_float_scale(w.scale)) {
    for (std::int64_t k = 0; k < count; k += kLanes) {
      T::store(to + k, byte_scale<T>(w, load_codes<T>(w, from + k, count - k)));
    }
    return;
  }
  const auto kind = static_cast<FloatKind>(w.scale);
  const std::int64_t bytes = float_bytes(kind);
  for (std::int64_t k = 0; k < count; k += kLanes, from += kLanes * bytes) {
    const bool whole = w.stats_end - from >= kLanes * bytes;
    T::store(to + k, load_kind_n<T>(kind, from, whole ? kLanes : count - k));
  }
}

/// Calls fn(k, number of slots, block) for the slots k of each second-level block in turn.
/// `position` counts slots from the start of the first block of the row.
template <class Fn>
void for_blocks(const KernelMatrix& w, std::int64_t position, std::int64_t count, Fn fn) {
  for (std::int64_t k = 0; k < count;) {
    const std::int64_t block = (position + k) / w.nested_group_size;
    const std::int64_t end = min64(count, (block + 1) * w.nested_group_size - position);
    fn(k, end - k, block);
    k = end;
  }
}

/// scale = map[u8] * absmax2[block] + nested_offset, product and sum each rounded to float32.
template <class T>
void expand_nested(const KernelMatrix& w, const std::uint8_t* codes, const std::uint8_t* absmax2,
                   std::int64_t position, std::int64_t count, float* to) {
  const typename T::F shift = T::set1(w.nested_offset);
  for_blocks(w, position, count, [&](std::int64_t k, std::int64_t n, std::int64_t block) {
    float value = 0.0F;
    __builtin_memcpy(&value, absmax2 + block * 4, sizeof(value));
    const typename T::F outer = T::set1(value);
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const typename T::F inner =
          T::lookup256(w.nested_map, load_codes<T>(w, codes + k + i, n - i));
      T::store(to + k + i, T::add(T::mul(inner, outer), shift));
    }
  });
}

/// How the bytes of a super-block become integers.
enum class SubCode { kUnsigned, kSigned, kLowNibble, kHighNibble };

/// outer[0] in eight lanes, then outer[1].
template <class T>
typename T::F two_blocks(const float* outer) {
  alignas(64) static constexpr float kLane[kLanes] = {0, 0, 0, 0, 0, 0, 0, 0,
                                                      1, 1, 1, 1, 1, 1, 1, 1};
  const auto low = T::lt(T::load(kLane), T::set1(0.5F));
  return T::select(low, T::set1(outer[0]), T::set1(outer[1]));
}

/// to[k] = outer[(phase + k) / size] for k < count.
template <class T>
void repeat_outer(const float* outer, std::int64_t size, std::int64_t phase, std::int64_t count,
                  float* to) {
  if (size == 8 && phase == 0) {  // two blocks a vector
    for (std::int64_t k = 0; k < count; k += kLanes, outer += 2) {
      T::store(to + k, two_blocks<T>(outer));
    }
    return;
  }
  std::int64_t k = 0;
  for (std::int64_t end = size - phase; k < count; end += size, ++outer) {
    const typename T::F value = T::set1(*outer);
    for (; k < min64(end, count); k += kLanes) T::store(to + k, value);
    k = min64(end, count);  // the last vector ran over into the next block
  }
}

/// Blocks of `size` slots that slots [position, position + count) touch.
struct SlotBlocks {
  std::int64_t first, count;
  std::int64_t phase;  ///< position of the first slot in the first block
};
inline SlotBlocks slot_blocks(std::int64_t position, std::int64_t count, std::int64_t size) {
  const std::int64_t first = position / size;
  return {first, (position + count - 1) / size - first + 1, position - first * size};
}

template <class T, SubCode kSub>
typename T::U sub_code(typename T::U code) {
  if constexpr (kSub == SubCode::kSigned) {
    return T::sub_u(T::xor_u(code, T::set1_u(0x80)), T::set1_u(0x80));
  }
  if constexpr (kSub == SubCode::kLowNibble) return T::and_u(code, T::set1_u(15));
  if constexpr (kSub == SubCode::kHighNibble) return T::template shr<4>(code);
  return code;
}

/// to[k] = float(super[block]) * sub-code, rounded once.
template <class T, SubCode kSub>
void expand_super(const KernelMatrix& w, const std::uint8_t* codes, const std::uint8_t* supers,
                  std::int64_t position, std::int64_t count, float* to) {
  float outer[kStretchSlots + kLanes];
  const std::int64_t size = w.nested_group_size;
  // A division by a constant is a shift, and most blocks have 8 slots.
  const SlotBlocks blocks =
      size == 8 ? slot_blocks(position, count, 8) : slot_blocks(position, count, size);
  for (std::int64_t b = 0; b < blocks.count; b += kLanes) {
    const std::uint8_t* from = supers + (blocks.first + b) * 2;
    const bool whole = w.stats_end - from >= kLanes * 2;
    T::store(outer + b, load_kind_n<T>(FloatKind::kF16, from, whole ? kLanes : blocks.count - b));
  }
  const auto value = [&](std::int64_t k, typename T::F block) {
    const typename T::U code = sub_code<T, kSub>(load_codes<T>(w, codes + k, count - k));
    T::store(to + k, T::mul(block, T::to_f(code)));
  };
  if (size == 8 && blocks.phase == 0) {
    for (std::int64_t k = 0; k < count; k += kLanes) value(k, two_blocks<T>(outer + k / 8));
    return;
  }
  repeat_outer<T>(outer, size, blocks.phase, count, to);
  for (std::int64_t k = 0; k < count; k += kLanes) value(k, T::load(to + k));
}

/// Sub-scales (and sub-offsets) of `count` slots from `first` on.
template <class T>
void expand_supers(const KernelMatrix& w, const std::uint8_t* stats, std::int64_t first,
                   std::int64_t count, Stretch& out) {
  const bool offsets = w.offset != OffsetKind::kNone;
  const std::uint8_t* codes = stats + first;
  if (w.scale == ScaleKind::kSuperU4) {  // both in one byte
    const std::uint8_t* supers = stats + w.slots;
    expand_super<T, SubCode::kLowNibble>(w, codes, supers, first, count, out.scale);
    if (!offsets) return;
    return expand_super<T, SubCode::kHighNibble>(w, codes, supers + 2 * w.nested_slots, first,
                                                 count, out.offset);
  }
  const std::uint8_t* supers = stats + (offsets ? 2 : 1) * w.slots;
  if (w.scale == ScaleKind::kSuperI8) {
    expand_super<T, SubCode::kSigned>(w, codes, supers, first, count, out.scale);
  } else {
    expand_super<T, SubCode::kUnsigned>(w, codes, supers, first, count, out.scale);
  }
  if (!offsets) return;
  expand_super<T, SubCode::kUnsigned>(w, codes + w.slots, supers + 2 * w.nested_slots, first, count,
                                      out.offset);
}

/// Phase of a row's first column; phases come from outside and are clamped so that no slot beyond
/// the row is ever read.
inline std::int64_t row_phase(const KernelMatrix& w, std::int64_t row) {
  if (!w.has_header) return 0;
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  const std::int64_t phase = stats[0] | (stats[1] << 8) | (stats[2] << 16);
  return min64(phase, w.slots * w.group_size - w.cols);
}

/// Statistics of the groups of columns [col, col + count) of a row of row runs. The caller keeps
/// the groups below kStretchSlots.
template <class T>
void expand_stretch(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    Stretch& out) {
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  const std::int64_t start = row_phase(w, row) + col;
  std::int64_t nested_phase = 0;
  if (w.has_header) {
    nested_phase = min64(stats[3], w.nested_slots * w.nested_group_size - w.slots);
    stats += 4;
  }
  const bool whole_row = !w.has_header && count == w.cols;  // short rows: spares two divisions
  const std::int64_t first = whole_row ? 0 : start / w.group_size;
  const std::int64_t slots = whole_row ? w.slots : (start + count - 1) / w.group_size - first + 1;
  out.phase = start - first * w.group_size;
  switch (w.scale) {
    case ScaleKind::kNestedU8:
      return expand_nested<T>(w, stats + first, stats + w.slots, nested_phase + first, slots,
                              out.scale);
    case ScaleKind::kSuperU8:
    case ScaleKind::kSuperI8:
    case ScaleKind::kSuperU4:
      return expand_supers<T>(w, stats, first, slots, out);
    default:
      break;
  }
  const std::int64_t bytes = scale_bytes(w.scale);
  expand_plain<T>(w, stats + first * bytes, slots, out.scale);
  if (w.has_offsets) {
    expand_plain<T>(w, stats + (w.slots + first) * bytes, slots, out.offset);
  }
}

// ------------------------------------------------------------------ scales of single columns

/// Statistics `stat` .. stat + count of a matrix that stores them flat, scale and offset in turn.
template <class T>
void expand_flat(const KernelMatrix& w, std::int64_t stat, std::int64_t count, float* scale,
                 float* offset) {
  const std::uint8_t* from = w.stats + stat * w.stat_bytes;
  if (!w.has_offsets) return expand_plain<T>(w, from, count, scale);
  const auto kind = static_cast<FloatKind>(w.scale);  // one-byte scales have no offsets
  const std::int64_t bytes = float_bytes(kind);
  for (std::int64_t k = 0; k < count; k += kLanes, from += 2 * kLanes * bytes) {
    const bool whole = w.stats_end - from >= 2 * kLanes * bytes;
    const std::int64_t n = 2 * (whole ? kLanes : count - k);
    const typename T::F a = load_kind_n<T>(kind, from, min64(n, kLanes));
    const typename T::F b =
        n <= kLanes ? a : load_kind_n<T>(kind, from + kLanes * bytes, n - kLanes);
    T::store(scale + k, T::even(a, b));
    T::store(offset + k, T::odd(a, b));
  }
}

/// One scale and offset for each of count <= kShortStretch columns, whatever the group map.
template <class T>
void expand_columns(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    Stretch& out) {
  if (w.groups == GroupKind::kColumnBlocks) {
    return expand_flat<T>(w, row / w.group_size * w.cols + col, count, out.scale, out.offset);
  }
  if (w.groups == GroupKind::kColumnRuns) {
    std::int64_t stat = (row * w.cols + col) % w.column_stats;
    for (std::int64_t k = 0; k < count;) {  // up to where the statistics begin again
      const std::int64_t n = min64(count - k, w.column_stats - stat);
      expand_flat<T>(w, stat, n, out.scale + k, out.offset + k);
      k += n;
      stat = 0;
    }
    return;
  }
  Stretch groups;
  expand_stretch<T>(w, row, col, count, groups);
  std::int64_t end = w.group_size - groups.phase;
  for (std::int64_t k = 0, slot = 0; k < count; ++slot, end += w.group_size) {
    const typename T::F s = T::set1(groups.scale[slot]);
    const typename T::F o = T::set1(w.has_offsets ? groups.offset[slot] : 0.0F);
    for (std::int64_t i = k; i < min64(end, count); i += kLanes) {  // the next group overwrites
      T::store(out.scale + i, s);
      T::store(out.offset + i, o);
    }
    k = min64(end, count);
  }
}

}  // namespace
}  // namespace quantal

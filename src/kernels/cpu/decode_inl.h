// Decoding of one row of a packed matrix, 16 values at a time, for any vector type T (vec_*.h).
//
// Statistics are expanded to float32 once per stretch of a row; then a 4-bit group becomes a table
// of its 16 exact values and codes are looked up, an 8-bit code is computed in the defined order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr std::int64_t kLanes = 16;
/// Columns decoded per expansion of statistics, and the most groups they touch.
constexpr std::int64_t kStretch = 4096;
constexpr std::int64_t kShortStretch = 256;  // groups of fewer than 16 codes, and column runs
constexpr std::int64_t kStretchSlots = kStretch / kLanes + 1;

constexpr std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline std::int64_t stretch_columns(const KernelMatrix& w) {
  return w.group_size < kLanes || w.column_stats != 0 ? kShortStretch : kStretch;
}

/// float32 statistics of the groups that a stretch touches; offsets are unset without an offset.
struct Stretch {
  float scale[kStretchSlots + kLanes];
  float offset[kStretchSlots + kLanes];
  std::int64_t group_size;  // 1 for column runs, where every column has its own statistic
  std::int64_t phase;       // position of the first column in its group
};

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
  return scaled;
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
  __builtin_memcpy(bytes, p, static_cast<std::size_t>(n * (kind == FloatKind::kF32 ? 4 : 2)));
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

/// `count` statistics in storage type `scale` to float32; writes up to 15 floats beyond. Whole
/// vectors are read wherever the buffer goes on far enough.
template <class T>
void expand_plain(const KernelMatrix& w, const std::uint8_t* from, std::int64_t count, float* to) {
  const auto kind = static_cast<FloatKind>(w.scale);
  const std::int64_t bytes = kind == FloatKind::kF32 ? 4 : 2;
  for (std::int64_t k = 0; k < count; k += kLanes, from += kLanes * bytes) {
    const bool whole = w.stats_end - from >= kLanes * bytes;
    T::store(to + k, load_kind_n<T>(kind, from, whole ? kLanes : count - k));
  }
}

/// n nested codes, or 16 where the buffer goes on far enough.
template <class T>
typename T::U load_codes(const KernelMatrix& w, const std::uint8_t* from, std::int64_t n) {
  if (w.stats_end - from >= kLanes) return T::load_u8(from);
  std::uint8_t bytes[kLanes] = {};
  __builtin_memcpy(bytes, from, static_cast<std::size_t>(min64(kLanes, n)));
  return T::load_u8(bytes);
}

/// scale = map[u8] * absmax2[block] + nested_offset, product and sum each rounded to float32.
/// `position` counts slots from the start of the first second-level block.
template <class T>
void expand_nested(const KernelMatrix& w, const std::uint8_t* codes, const std::uint8_t* absmax2,
                   std::int64_t position, std::int64_t count, float* to) {
  const typename T::F shift = T::set1(w.nested_offset);
  for (std::int64_t k = 0; k < count;) {
    const std::int64_t block = (position + k) / w.nested_group_size;
    const std::int64_t end = min64(count, (block + 1) * w.nested_group_size - position);
    float value = 0.0F;
    __builtin_memcpy(&value, absmax2 + block * 4, sizeof(value));
    const typename T::F outer = T::set1(value);
    for (; k < end; k += kLanes) {
      const typename T::F inner = T::gather(w.nested_map, load_codes<T>(w, codes + k, end - k));
      T::store(to + k, T::add(T::mul(inner, outer), shift));
    }
    k = end;
  }
}

/// Column runs: statistic of column c of row r is (r * cols + c) mod column_stats.
template <class T>
void expand_columns(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    Stretch& out) {
  const auto kind = static_cast<FloatKind>(w.scale);
  const std::int64_t bytes = kind == FloatKind::kF32 ? 4 : 2;
  std::int64_t stat = (row * w.cols + col) % w.column_stats;
  alignas(64) std::uint8_t scales[kLanes * 4] = {};
  alignas(64) std::uint8_t offsets[kLanes * 4] = {};
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const std::int64_t n = min64(kLanes, count - k);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* from = w.stats + stat * w.stat_bytes;
      __builtin_memcpy(scales + i * bytes, from, static_cast<std::size_t>(bytes));
      if (w.offset != OffsetKind::kNone) {
        __builtin_memcpy(offsets + i * bytes, from + bytes, static_cast<std::size_t>(bytes));
      }
      stat = stat + 1 == w.column_stats ? 0 : stat + 1;
    }
    T::store(out.scale + k, load_kind<T>(kind, scales));
    T::store(out.offset + k, load_kind<T>(kind, offsets));
  }
  out.group_size = 1;
  out.phase = 0;
}

/// Statistics of columns [col, col + count) of a row, count <= stretch_columns(w). Phases come from
/// outside and are clamped so that no slot beyond the row is ever read.
template <class T>
void expand_stretch(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    Stretch& out) {
  if (w.column_stats != 0) return expand_columns<T>(w, row, col, count, out);
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  std::int64_t phase = 0;
  std::int64_t nested_phase = 0;
  if (w.has_header) {
    phase = stats[0] | (stats[1] << 8) | (stats[2] << 16);
    phase = min64(phase, w.slots * w.group_size - w.cols);
    nested_phase = min64(stats[3], w.nested_slots * w.nested_group_size - w.slots);
    stats += 4;
  }
  const std::int64_t first = (phase + col) / w.group_size;
  const std::int64_t last = (phase + col + count - 1) / w.group_size;
  const std::int64_t slots = last - first + 1;
  out.group_size = w.group_size;
  out.phase = phase + col - first * w.group_size;
  if (w.scale == ScaleKind::kNestedU8) {
    expand_nested<T>(w, stats + first, stats + w.slots, nested_phase + first, slots, out.scale);
    return;
  }
  const std::int64_t bytes = w.scale == ScaleKind::kF32 ? 4 : 2;
  expand_plain<T>(w, stats + first * bytes, slots, out.scale);
  if (w.offset != OffsetKind::kNone) {
    expand_plain<T>(w, stats + (w.slots + first) * bytes, slots, out.offset);
  }
}

/// Decoder of one row with everything that can be fixed at compile time.
template <class T, OffsetKind kOffset, FloatKind kKind>
struct RowDecoder {
  using F = typename T::F;
  using U = typename T::U;
  const KernelMatrix& w;
  F table = T::load(w.table);
  F centre = T::set1(w.centre);

  F exact(F c, F s, F o) const { return finish<T, kOffset, kKind>(c, s, o); }
  /// The 16 exact values of a 4-bit group.
  F group_table(float scale, float offset) const {
    return finish<T, kOffset, kKind>(table, T::set1(scale), T::set1(offset));
  }
  /// Mapped codes of columns [col, col + 16), col a multiple of 16.
  F mapped(const std::uint8_t* codes, std::int64_t col) const {
    if (w.bits == 8) return T::sub(T::to_f(T::load_u8(codes + col)), centre);
    const U raw = T::load_u8(codes + col / 32 * kLanes);
    return T::lookup16(table, (col & 16) != 0 ? T::template shr<4>(raw) : raw);
  }

  /// Calls sink(column relative to col, values) for every 16 columns, sink.tail(column, values, n)
  /// for the last n < 16. col is a multiple of 32, codes the row's first byte.
  template <class Sink>
  void run(const std::uint8_t* codes, std::int64_t col, std::int64_t count, const Stretch& stats,
           Sink& sink) const {
    const std::int64_t full = count / kLanes * kLanes;
    std::int64_t done = 0;
    if (stats.group_size % kLanes == 0 && stats.phase % kLanes == 0) {
      std::int64_t slot = 0;
      std::int64_t border = stats.group_size - stats.phase;
      for (; done < full; ++slot, border += stats.group_size) {
        const std::int64_t end = min64(border, full);
        if (w.bits == 4) {
          run_group4(codes, col, done, end, stats.scale[slot], stats.offset[slot], sink);
        } else {
          run_group8(codes + col, done, end, stats.scale[slot], stats.offset[slot], sink);
        }
        done = end;
      }
    }
    for (; done < full; done += kLanes) sink(done, lanes(codes, col, done, kLanes, stats));
    if (done < count) sink.tail(done, lanes(codes, col, done, count - done, stats), count - done);
  }

  template <class Sink>
  void run_group4(const std::uint8_t* codes, std::int64_t col, std::int64_t begin, std::int64_t end,
                  float scale, float offset, Sink& sink) const {
    const F values = group_table(scale, offset);
    const std::uint8_t* strip = codes + (col + begin) / 32 * kLanes;
    if ((begin & 16) != 0) {
      sink(begin, T::lookup16(values, T::template shr<4>(T::load_u8(strip))));
      begin += kLanes;
      strip += kLanes;
    }
    for (; begin + 2 * kLanes <= end; begin += 2 * kLanes, strip += kLanes) {
      const U raw = T::load_u8(strip);
      sink(begin, T::lookup16(values, raw));
      sink(begin + kLanes, T::lookup16(values, T::template shr<4>(raw)));
    }
    if (begin < end) sink(begin, T::lookup16(values, T::load_u8(strip)));
  }

  template <class Sink>
  void run_group8(const std::uint8_t* codes, std::int64_t begin, std::int64_t end, float scale,
                  float offset, Sink& sink) const {
    const F s = T::set1(scale);
    const F o = T::set1(offset);
    for (; begin < end; begin += kLanes) {
      const F c = T::sub(T::to_f(T::load_u8(codes + begin)), centre);
      sink(begin, finish<T, kOffset, kKind>(c, s, o));
    }
  }

  /// n <= 16 values whose groups may end anywhere; the other lanes are unspecified.
  F lanes(const std::uint8_t* codes, std::int64_t col, std::int64_t done, std::int64_t n,
          const Stretch& stats) const {
    const F c = mapped(codes, col + done);
    if (stats.group_size == 1) {
      return finish<T, kOffset, kKind>(c, T::load(stats.scale + done),
                                       T::load(stats.offset + done));
    }
    alignas(64) float scale[kLanes] = {};
    alignas(64) float offset[kLanes] = {};
    std::int64_t slot = (stats.phase + done) / stats.group_size;
    std::int64_t left = (slot + 1) * stats.group_size - stats.phase - done;
    for (std::int64_t i = 0; i < n; ++i) {
      scale[i] = stats.scale[slot];
      if constexpr (kOffset != OffsetKind::kNone) offset[i] = stats.offset[slot];
      if (--left == 0) {
        ++slot;
        left = stats.group_size;
      }
    }
    return finish<T, kOffset, kKind>(c, T::load(scale), T::load(offset));
  }
};

/// Calls fn(RowDecoder) with the decoder of this matrix.
template <class T, OffsetKind kOffset, class Fn>
void with_kind(const KernelMatrix& w, Fn& fn) {
  switch (w.value_kind) {
    case FloatKind::kF32:
      return fn(RowDecoder<T, kOffset, FloatKind::kF32>{w});
    case FloatKind::kF16:
      return fn(RowDecoder<T, kOffset, FloatKind::kF16>{w});
    case FloatKind::kBF16:
      return fn(RowDecoder<T, kOffset, FloatKind::kBF16>{w});
  }
}
template <class T, class Fn>
void with_decoder(const KernelMatrix& w, Fn fn) {
  switch (w.offset) {
    case OffsetKind::kNone:
      return with_kind<T, OffsetKind::kNone>(w, fn);
    case OffsetKind::kBias:
      return with_kind<T, OffsetKind::kBias>(w, fn);
    case OffsetKind::kShift:
      return with_kind<T, OffsetKind::kShift>(w, fn);
    case OffsetKind::kZeroPoint:
      return with_kind<T, OffsetKind::kZeroPoint>(w, fn);
  }
}

}  // namespace
}  // namespace quantal

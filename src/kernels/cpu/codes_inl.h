// Codes of a row, 16 at a time, for any vector type T (vec_*.h) and every width.
//
// A chunk is 16 columns. Widths up to 4 are table indices: lookups read the low 3 or 4 bits of a
// lane, and tables of fewer values repeat, so bits above the code need no masking. Wider codes are
// numbers and come out clean.
#pragma once

#include <cstdint>

#include "kernels/cpu/stats_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// V is a vector type or its Words, lanes in which only table indices fit.
template <class V, int kBits>
struct Codes : Planes<kBits> {
  using U = typename V::U;
  using Planes<kBits>::kLow, Planes<kBits>::kHigh, Planes<kBits>::kFields;
  using Planes<kBits>::kUnitChunks, Planes<kBits>::kUnitBytes, Planes<kBits>::kLowBytes;
  static constexpr bool kTable = kBits <= 4;

  /// Puts the planes of one chunk together. Bit kLow is where the high plane begins.
  static U join(U low, U high) {
    if constexpr (kBits == 3) {
      return V::merge_bits(V::set1_u(3), low, high);
    } else {
      constexpr std::uint32_t kHighMask = ((1U << kHigh) - 1U) << kLow;
      return V::or_u(V::and_u(low, V::set1_u(15)), V::and_u(high, V::set1_u(kHighMask)));
    }
  }

  /// Chunk number kChunk of a unit: 4 instructions for two planes, at most 1 for one.
  template <int kChunk>
  static U chunk(const std::uint8_t* unit) {
    const U low =
        V::template shr<kLow*(kChunk % kFields)>(V::load_u8(unit + kChunk / kFields * kLanes));
    if constexpr (kHigh == 0) {
      return low;
    } else {
      constexpr int kShift = kHigh * kChunk - kLow;
      const U strip = V::load_u8(unit + kLowBytes);
      if constexpr (kShift >= 0) return join(low, V::template shr<kShift>(strip));
      if constexpr (kShift < 0) return join(low, V::template shl<-kShift>(strip));
    }
  }

  /// The chunk of columns [col, col + 16), col any multiple of 16; codes is the row's first byte.
  static U at(const std::uint8_t* codes, std::int64_t col) {
    const auto number = static_cast<std::uint64_t>(col) / kLanes;
    if constexpr (kBits == 8) {
      return V::load_u8(codes + number * kLanes);
    } else {
      const std::uint8_t* unit = codes + number / kUnitChunks * kUnitBytes;
      const auto in_unit = static_cast<unsigned>(number % kUnitChunks);
      const U low = V::shr_by(V::load_u8(unit + in_unit / kFields * kLanes),
                              static_cast<int>(kLow * (in_unit % kFields)));
      if constexpr (kHigh == 0) {
        return low;
      } else {
        const U strip = V::load_u8(unit + kLowBytes);
        return join(low,
                    V::template shl<kLow>(V::shr_by(strip, static_cast<int>(kHigh * in_unit))));
      }
    }
  }
};

template <class T, int kBits>
typename T::F lookup(typename T::F table, typename T::U index) {
  static_assert(kBits <= 4);
  return kBits < 4 ? T::lookup8(table, index) : T::lookup16(table, index);
}

/// Values of codes before scaling.
template <class T, int kCodeBits, CodeKind kCodeKind>
struct Reader : Codes<T, kCodeBits> {
  static constexpr int kBits = kCodeBits;
  static constexpr CodeKind kKind = kCodeKind;
  using F = typename T::F;
  F constant;  // the table or the centre

  explicit Reader(const KernelMatrix& w)
      : constant(kBits <= 4 ? T::load(w.table) : T::set1(w.centre)) {}
  F map(typename T::U code) const {
    if constexpr (kBits <= 4) return lookup<T, kBits>(constant, code);
    if constexpr (kKind == CodeKind::kE4M3) return e4m3<T>(code);
    if constexpr (kKind == CodeKind::kE5M2) return e5m2<T>(code);
    return T::sub(T::to_f(code), constant);
  }
};

/// Calls fn with std::integral_constant-like width: fn(Width<kBits>).
template <int kValue>
struct Width {
  static constexpr int kBits = kValue;
};

/// Widths whose codes are table indices.
template <class Fn>
void with_table_width(int bits, Fn fn) {
  switch (bits) {
    case 1:
      return fn(Width<1>{});
    case 2:
      return fn(Width<2>{});
    case 3:
      return fn(Width<3>{});
    default:
      return fn(Width<4>{});
  }
}

/// Calls fn(Reader) for a matrix of more than 4 bits.
template <class T, class Fn>
void with_wide_reader(const KernelMatrix& w, Fn fn) {
  if (w.code_kind == CodeKind::kE4M3) return fn(Reader<T, 8, CodeKind::kE4M3>(w));
  if (w.code_kind == CodeKind::kE5M2) return fn(Reader<T, 8, CodeKind::kE5M2>(w));
  switch (w.bits) {
    case 5:
      return fn(Reader<T, 5, CodeKind::kNumber>(w));
    case 6:
      return fn(Reader<T, 6, CodeKind::kNumber>(w));
    default:
      return fn(Reader<T, 8, CodeKind::kNumber>(w));
  }
}

template <class T, class Fn>
void with_reader(const KernelMatrix& w, Fn fn) {
  if (w.bits > 4) return with_wide_reader<T>(w, fn);
  with_table_width(w.bits, [&w, &fn](auto width) {
    fn(Reader<T, decltype(width)::kBits, CodeKind::kNumber>(w));
  });
}

}  // namespace
}  // namespace quantal

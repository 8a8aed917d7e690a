// Decoding of one row of a packed matrix to float32, for any vector type T (vec_*.h).
//
// Where groups begin and end on whole vectors of 16 codes, a group of a width up to 4 bits becomes
// a table of its exact values and codes are looked up in it; wider codes are computed in the
// defined order. Elsewhere every column gets its own scale and offset first.
#pragma once

#include "kernels/cpu/codes_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// True if no vector of 16 columns holds a border of groups.
inline bool whole_vectors(const KernelMatrix& w, std::int64_t row) {
  return w.groups == GroupKind::kRowRuns && w.group_size % kLanes == 0 &&
         row_phase(w, row) % kLanes == 0;
}

/// Calls fn(slot, begin, end) for the groups of a stretch of `count` columns.
template <class Fn>
void for_groups(std::int64_t group_size, std::int64_t phase, std::int64_t count, Fn fn) {
  std::int64_t begin = 0;
  std::int64_t end = group_size - phase;
  for (std::int64_t slot = 0; begin < count; ++slot, end += group_size) {
    const std::int64_t stop = min64(end, count);
    fn(slot, begin, stop);
    begin = stop;
  }
}

/// Columns whose tables are built before their codes are read: few, so that the processor overlaps
/// the two, and 16 KiB at most.
constexpr std::int64_t kTableColumns = 256;
constexpr std::int64_t kMaxTables = kTableColumns / kLanes + 1;

/// tables[16 k + code], the exact values of codes of at most 4 bits under scale[k] and offset[k].
template <class T>
void build_tables(const KernelMatrix& w, const float* scale, const float* offset,
                  std::int64_t count, float* tables) {
  const typename T::F codes = T::load(w.table);
  with_rule(w, [&](auto rule) {
    for (std::int64_t k = 0; k < count; ++k) {
      T::store(tables + k * kLanes,
               rule.template value<T>(codes, T::set1(scale[k]), T::set1(offset[k])));
    }
  });
}

/// Calls fn(tables, number of tables, phase, first column, columns) for parts of columns
/// [col, col + count), count <= kStretch, of a row for which whole_vectors holds and whose codes
/// have at most 4 bits; phase is the position of the first column in the first table's group.
template <class T, class Fn>
void for_tables(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                Fn fn) {
  alignas(64) float tables[kMaxTables * kLanes];
  Stretch stats;
  expand_stretch<T>(w, row, col, count, stats);
  for (std::int64_t c = 0; c < count; c += kTableColumns) {
    const std::int64_t n = min64(kTableColumns, count - c);
    const std::int64_t first = (stats.phase + c) / w.group_size;
    const std::int64_t slots = (stats.phase + c + n - 1) / w.group_size - first + 1;
    build_tables<T>(w, stats.scale + first, stats.offset + first, slots, tables);
    fn(tables, slots, stats.phase + c - first * w.group_size, c, n);
  }
}

/// Whole vectors, at most 4 bits. out has room for `count` rounded up to 16.
template <class T>
void decode_tables(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                   float* out) {
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  with_table_width(w.bits, [&]<class W>(W /*width*/) {
    for_tables<T>(
        w, row, col, count,
        [&](const float* tables, std::int64_t /*slots*/, std::int64_t phase, std::int64_t c,
            std::int64_t n) {
          for_groups(
              w.group_size, phase, n, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
                const typename T::F table = T::load(tables + slot * kLanes);
                for (std::int64_t k = c + begin; k < c + end; k += kLanes) {
                  T::store(out + k,
                           lookup<T, W::kBits>(table, Codes<T, W::kBits>::at(codes, col + k)));
                }
              });
        });
  });
}

/// Whole vectors, more than 4 bits.
template <class T>
void decode_numbers(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    float* out) {
  Stretch stats;
  expand_stretch<T>(w, row, col, count, stats);
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  with_wide_reader<T>(w, [&](auto reader) {
    with_rule(w, [&](auto rule) {
      for_groups(w.group_size, stats.phase, count,
                 [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
                   const typename T::F s = T::set1(stats.scale[slot]);
                   const typename T::F o = T::set1(stats.offset[slot]);
                   for (; begin < end; begin += kLanes) {
                     const typename T::F c = reader.map(reader.at(codes, col + begin));
                     T::store(out + begin, rule.template value<T>(c, s, o));
                   }
                 });
    });
  });
}

/// Any groups; count <= kShortStretch.
template <class T>
void decode_columns(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                    float* out) {
  Stretch stats;
  expand_columns<T>(w, row, col, count, stats);
  const std::uint8_t* codes = w.codes + row * w.code_bytes;
  with_reader<T>(w, [&](auto reader) {
    for (std::int64_t k = 0; k < count; k += kLanes) {
      T::store(out + k, reader.map(reader.at(codes, col + k)));
    }
  });
  with_rule(w, [&](auto rule) {
    for (std::int64_t k = 0; k < count; k += kLanes) {
      T::store(out + k, rule.template value<T>(T::load(out + k), T::load(stats.scale + k),
                                               T::load(stats.offset + k)));
    }
  });
}

/// Columns [col, col + count) of a row, col a multiple of 16, to float32; zero from there to the
/// next multiple of 16 (padding codes may stand under any scale).
template <class T>
void decode_row(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                float* out) {
  const bool whole = whole_vectors(w, row);
  const std::int64_t step = whole ? kStretch : kShortStretch;
  for (std::int64_t c = 0; c < count; c += step) {
    const std::int64_t n = min64(step, count - c);
    if (!whole) {
      decode_columns<T>(w, row, col + c, n, out + c);
    } else if (w.bits <= 4) {
      decode_tables<T>(w, row, col + c, n, out + c);
    } else {
      decode_numbers<T>(w, row, col + c, n, out + c);
    }
  }
  for (std::int64_t c = count; c % kLanes != 0; ++c) out[c] = 0.0F;
}

}  // namespace
}  // namespace quantal

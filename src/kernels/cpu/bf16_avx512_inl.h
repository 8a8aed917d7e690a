// What the bfloat16 products share: statistics and tables for steps, rows decoded to scratch, sums
// of lanes. AVX-512 with BF16 only; included by *_avx512bf16.cpp alone.
//
// vdpbf16ps multiplies 32 pairs exactly and adds two products to each of 16 float32 lanes; it reads
// subnormal operands as zero. Weights are rounded to bfloat16, as the panels of larger products
// are; those of dialects whose values are bfloat16 stay what they are.
#pragma once

#include "kernels/cpu/bf16_steps_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

/// Scratch and packed activations are zero up to a multiple of this many columns.
constexpr std::int64_t kPadColumns = 64;

/// to[k] = from[(phase + size k) / group_size] for the slots of `size` columns of `count` columns.
inline void repeat_for_slots(const float* from, std::int64_t group_size, std::int64_t phase,
                             std::int64_t size, std::int64_t count, float* to) {
  const std::int64_t slots = (count + size - 1) / size;
  for (int shift = 1; shift <= 3 && phase == 0; ++shift) {
    if (group_size != size << shift) continue;
    const __m512i at =
        _mm512_srl_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm_cvtsi32_si128(shift));
    for (std::int64_t k = 0; k < slots; k += kLanes, from += kLanes >> shift) {
      _mm512_storeu_ps(to + k, _mm512_permutexvar_ps(at, _mm512_loadu_ps(from)));
    }
    return;
  }
  repeat_outer<VecBf16>(from, group_size / size, phase / size, slots, to);
}

/// expand_stretch with a slot for every `size` columns, which divide the groups. T: VecBf16, or
/// VecAvx512 where subnormal scales are not zero.
template <class T = VecBf16>
void expand_slots(const KernelMatrix& w, std::int64_t size, std::int64_t row, std::int64_t col,
                  std::int64_t count, Stretch& out) {
  if (size == w.group_size) return expand_stretch<T>(w, row, col, count, out);
  Stretch groups;
  expand_stretch<T>(w, row, col, count, groups);
  repeat_for_slots(groups.scale, w.group_size, groups.phase, size, count, out.scale);
  if (w.offset != OffsetKind::kNone) {
    repeat_for_slots(groups.offset, w.group_size, groups.phase, size, count, out.offset);
  }
  out.phase = 0;
}
/// The same for slot_columns; step_fields is not 0.
template <class T = VecBf16>
void expand_steps(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count,
                  Stretch& out) {
  expand_slots<T>(w, slot_columns(w), row, col, count, out);
}

/// out[r * ld + 16 k + code]: the tables of groups first + k of some rows, 32 bytes each, two
/// groups at a time: one more than there are may be written.
template <class V>
void build_bf16_tables(__m512 codes, const Stretch* stats, std::int64_t rows, std::int64_t first,
                       std::int64_t groups, std::uint16_t* out, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r, out += ld) {
    const float* scale = stats[r].scale + first;
    const float* offset = stats[r].offset + first;
    const auto values = [=](std::int64_t k) {
      return wide_value<V>(codes, _mm512_set1_ps(scale[k]), _mm512_set1_ps(offset[k]));
    };
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < groups; k += 2) {
      _mm512_store_si512(out + k * kLanes, narrow_two(values(k), values(k + 1)));
    }
  }
}
using BuildBf16Tables = void (*)(__m512 codes, const Stretch* stats, std::int64_t rows,
                                 std::int64_t first, std::int64_t groups, std::uint16_t* out,
                                 std::int64_t ld);

inline BuildBf16Tables bf16_table_builder(const KernelMatrix& w) {
  BuildBf16Tables build = nullptr;
  with_table_rule(w, [&]<class V>(V /*rule*/) { build = build_bf16_tables<V>; });
  return build;
}
/// Those of a step, the first of which is at `tables`.
template <class L>
[[gnu::always_inline]] inline typename L::Group load_tables(const std::uint16_t* tables) {
  const auto one = [=](int k) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(tables + k * kLanes));
  };
  if constexpr (L::kTables == StepTables::kOne) {
    return {{_mm512_broadcast_i64x4(one(0))}};
  } else if constexpr (L::kTables == StepTables::kHalves) {
    return {{load_512(tables)}};
  } else {
    typename L::Group group;
#pragma GCC unroll 4
    for (int f = 0; f < L::kFields; ++f) {
      group.of[f] = _mm512_inserti64x4(_mm512_castsi256_si512(one(f)), one(L::kFields + f), 1);
    }
    return group;
  }
}

// ------------------------------------------------------------------ rows to scratch

/// Columns [col + k, col + k + n) of a row, then zeros up to a multiple of kPadColumns. `stats` is
/// what expand_stretch gave for the columns from `col` on (unused where step_fields is 0); n is a
/// multiple of the step unless the row ends, with half a step perhaps.
using DecodeBf16 = void (*)(const KernelMatrix& w, const Stretch& stats, std::int64_t row,
                            std::int64_t col, std::int64_t k, std::int64_t n, std::uint16_t* out);

inline void pad_columns(std::int64_t n, std::uint16_t* out) {
  for (; n % kPadColumns != 0; ++n) out[n] = 0;
}

inline void decode_any(const KernelMatrix& w, const Stretch& /*stats*/, std::int64_t row,
                       std::int64_t col, std::int64_t k, std::int64_t n, std::uint16_t* out) {
  dequantize_row<VecBf16>(w, FloatKind::kBF16, row, col + k, n,
                          reinterpret_cast<std::uint8_t*>(out));
  pad_columns(n, out);
}

/// One step of codes; kInOrder: columns in the order of memory.
template <bool kInOrder, class Step>
[[gnu::always_inline]] inline void decode_step(const Step& step, const std::uint8_t* codes,
                                               const typename Step::Group& group,
                                               std::uint16_t* out) {
  constexpr int kFields = Step::kFields;
  __m512i values[kFields];
  step.look_up(codes, group, values);
  const auto store_half = [out](int chunk, __m256i half) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + chunk * kLanes), half);
  };
#pragma GCC unroll 4
  for (int f = 0; f < kFields; ++f) {
    if (!kInOrder || kFields == 1) {
      _mm512_storeu_si512(out + 32 * f, values[f]);
    } else {
      store_half(f, _mm512_castsi512_si256(values[f]));
      store_half(kFields + f, _mm512_extracti64x4_epi64(values[f], 1));
    }
  }
}

template <bool kInOrder, class Step>
void decode_steps(const KernelMatrix& w, const Stretch& stats, std::int64_t row, std::int64_t col,
                  std::int64_t k, std::int64_t n, std::uint16_t* out) {
  const Step step(w);
  const std::uint8_t* codes =
      w.codes + row * w.code_bytes + (col + k) / Step::kColumns * Step::kBytes;
  const std::int64_t slot_size = slot_columns<Step>(w);
  const std::int64_t width = slot_size * Step::kGroupsOfStep;  // columns that share a Group
  std::int64_t slot = static_cast<std::uint32_t>(stats.phase + k) /
                      static_cast<std::uint32_t>(slot_size);  // faster than 64 bits
  const std::int64_t whole = n - n % Step::kColumns;
  std::int64_t c = 0;
  if (width == Step::kColumns) {
    if constexpr (requires(typename Step::Group(&pair)[2]) {
                    step.two_groups(stats, slot, pair);
                  }) {
      for (; c + 2 * Step::kColumns <= n; c += 2 * Step::kColumns, slot += 2) {
        typename Step::Group pair[2];
        step.two_groups(stats, slot, pair);
        decode_step<kInOrder>(step, codes, pair[0], out + c);
        decode_step<kInOrder>(step, codes + Step::kBytes, pair[1], out + c + Step::kColumns);
        codes += 2 * Step::kBytes;
      }
    }
    for (; c < whole; c += Step::kColumns, slot += Step::kGroupsOfStep, codes += Step::kBytes) {
      decode_step<kInOrder>(step, codes, step.group(stats, slot), out + c);
    }
  }
  std::int64_t end = (slot + Step::kGroupsOfStep) * slot_size - stats.phase - k;
  for (; c < whole; slot += Step::kGroupsOfStep, end += width) {
    const typename Step::Group group = step.group(stats, slot);
    for (const std::int64_t stop = min64(end, whole); c < stop; c += Step::kColumns) {
      decode_step<kInOrder>(step, codes, group, out + c);
      codes += Step::kBytes;
    }
  }
  if constexpr (Step::kFields > 1) {
    if (whole < n) {
      const typename Step::Half half(w);
      decode_step<kInOrder>(half, codes, half.group(stats, slot), out + whole);
    }
  }
  if (!kInOrder) pad_columns(n, out);
}

/// kInOrder: columns in the order of memory and nothing behind them; step_fields is not 0.
template <bool kInOrder = false>
DecodeBf16 bf16_decoder(const KernelMatrix& w) {
  DecodeBf16 decode = decode_any;
  if (step_fields(w) == 0) return decode;
  if (w.bits > 4) {
    with_numbers(w, [&]<class Step>() { decode = decode_steps<kInOrder, Step>; });
    return decode;
  }
  with_table_rule(w, [&]<class V>(V /*rule*/) {
    with_lookup(w, [&]<class L>() { decode = decode_steps<kInOrder, TableStep<V, L>>; });
  });
  return decode;
}

/// Lane j: the sum of the lanes of v[j]. The order is (b0 + b1) + (b2 + b3) over blocks of four
/// lanes, within a block (0 + 2) + (1 + 3).
inline __m128 sum_lanes(const __m512 (&v)[4]) {
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d a = pairs(v[0], v[1]);
  const __m512d b = pairs(v[2], v[3]);
  const __m512 blocks = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const auto fold = [](__m256 h) {
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  };
  return _mm_add_ps(fold(VecBf16::low(blocks)), fold(VecBf16::high(blocks)));
}

// ------------------------------------------------------------------ few inputs, tiles

/// Inputs up to which products go straight from registers, and those of a register tile.
constexpr std::int64_t kMaxDirectInputs = 11;
constexpr std::int64_t kSubInputs = 4;

/// Inputs of one register tile: at most kSubInputs, tiles of nearly equal size.
constexpr std::int64_t register_inputs(std::int64_t inputs) {
  const std::int64_t tiles = (inputs + kSubInputs - 1) / kSubInputs;
  return (inputs + tiles - 1) / tiles;
}

/// Statistics are read all at once before the codes: unless they were asked for, that waits for
/// memory.
inline void ask_for_stats(const KernelMatrix& w, std::int64_t row, std::int64_t rows) {
  const std::uint8_t* stats = w.stats + row * w.stat_bytes;
  const std::int64_t bytes = min64(rows, w.rows - row) * w.stat_bytes;
  for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(stats + byte);
}

/// y[m, row .. row + rows) from their sums in float32, rows <= kLanes.
inline void store_outputs(const Bf16Job& job, const float* sums, std::int64_t m, std::int64_t row,
                          std::int64_t rows) {
  __m512 v = _mm512_maskz_loadu_ps(VecAvx512::first(static_cast<int>(rows)), sums);
  if (job.bias != nullptr) {
    v = _mm512_add_ps(
        v, _mm512_maskz_loadu_ps(VecAvx512::first(static_cast<int>(rows)), job.bias + row));
  }
  store_kind_n<VecAvx512>(FloatKind::kBF16, v, job.y + m * job.ldy + row, rows);
}

}  // namespace
}  // namespace quantal

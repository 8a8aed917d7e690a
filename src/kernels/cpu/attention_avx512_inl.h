// What attention forward and backward share on AVX-512 with BF16: a product of small matrices, the
// two orders in which operands stand, powers of two. Included by attention_*avx512bf16.cpp alone.
//
// Scores are computed transposed: a lane is a row (a query of a head), so that maxima, sums and
// scales of rows are whole vectors and nothing goes across lanes. Every product is
//   c[r][lane] += sum over steps of a(r, step) b[step][lane],
// in which a step is two bfloat16, broadcast on the left and side by side in a lane's word on the
// right.
#pragma once

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/products_avx512_inl.h"
#include "kernels/cpu/transpose_avx512_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kRowBlock = BlockAttention::kRows;
constexpr std::int64_t kKeyBlock = 64;
constexpr int kRowVecs = kRowBlock / kLanes;

/// The left side of a product: step s of row r is the two elements at data + r * row + s * step.
struct Left {
  const std::uint16_t* data;
  std::int64_t row, step;
};
/// The right side and the result: `ld` words or float32 from one step or row to the next.
struct Right {
  const std::uint32_t* data;
  std::int64_t ld;
};
struct Sums {
  float* data;
  std::int64_t ld;
};

template <int kRows, int kVecs, bool kAdd>
[[gnu::noinline]] void multiply_tile(Left a, Right b, std::int64_t steps, Sums c) {
  __m512 sums[kRows * kVecs];
#pragma GCC unroll 24
  for (int i = 0; i < kRows * kVecs; ++i) {
    sums[i] = kAdd ? _mm512_loadu_ps(c.data + i / kVecs * c.ld + i % kVecs * kLanes)
                   : _mm512_setzero_ps();
  }
  const std::uint16_t* left = a.data;
  const std::uint32_t* right = b.data;
  for (std::int64_t s = 0; s < steps; ++s, left += a.step, right += b.ld) {
    __m512i lanes[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) lanes[v] = load_512(right + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int two = 0;
      __builtin_memcpy(&two, left + r * a.row, sizeof(two));
      const __m512i word = _mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) add_products(sums[r * kVecs + v], lanes[v], word);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows * kVecs; ++i) {
    _mm512_storeu_ps(c.data + i / kVecs * c.ld + i % kVecs * kLanes, sums[i]);
  }
}

template <int kCount>
struct RowCount {
  static constexpr int kRows = kCount;
};

template <int kVecs, bool kAdd>
void multiply_rows(Left a, std::int64_t rows, Right b, std::int64_t steps, Sums c) {
  std::int64_t r = 0;
  const auto tiles = [&](auto count) {
    constexpr int kRows = decltype(count)::kRows;
    for (; r + kRows <= rows; r += kRows) {
      multiply_tile<kRows, kVecs, kAdd>({a.data + r * a.row, a.row, a.step}, b, steps,
                                        {c.data + r * c.ld, c.ld});
    }
  };
  if constexpr (kVecs <= 2) tiles(RowCount<12>{});
  tiles(RowCount<6>{});
  tiles(RowCount<4>{});
  tiles(RowCount<2>{});
  tiles(RowCount<1>{});
}

/// c[r][16 vecs lanes] of `rows` rows, added to what is there if kAdd.
template <bool kAdd>
void multiply(Left a, std::int64_t rows, Right b, std::int64_t vecs, std::int64_t steps, Sums c) {
  for (; vecs >= 4; vecs -= 4, b.data += 4 * kLanes, c.data += 4 * kLanes) {
    multiply_rows<4, kAdd>(a, rows, b, steps, c);
  }
  if (vecs == 3) multiply_rows<3, kAdd>(a, rows, b, steps, c);
  if (vecs == 2) multiply_rows<2, kAdd>(a, rows, b, steps, c);
  if (vecs == 1) multiply_rows<1, kAdd>(a, rows, b, steps, c);
}

/// Rows of one problem (attention_kernels.h), a block of them: null beyond the last.
struct BlockRows {
  AttentionRows rows;
  std::int64_t group, first, count;

  std::uint16_t* operator()(std::int64_t i) const {
    if (i >= count) return nullptr;
    const std::int64_t r = first + i;
    return static_cast<std::uint16_t*>(rows.data) + r / group * rows.position +
           r % group * rows.head;
  }
};
/// Keys or values [first, first + count).
struct BlockKeys {
  const void* data;
  std::int64_t stride, first, count;

  const std::uint16_t* operator()(std::int64_t i) const {
    if (i >= count) return nullptr;
    return static_cast<const std::uint16_t*>(data) + (first + i) * stride;
  }
};

/// out[d / 2][row]: values d and d + 1 of kRowBlock rows, a lane each; zero where row(i) is null.
template <class Rows>
void pack_lanes(const Rows& row, std::int64_t dim, std::uint32_t* out) {
  for (std::int64_t first = 0; first < kRowBlock; first += kLanes) {
    for (std::int64_t d = 0; d < dim; d += 32) {
      const auto words = static_cast<int>(dim - d >= 32 ? 16 : 8);
      const auto mask = static_cast<__mmask16>(words == 16 ? 0xFFFF : 0xFF);
      __m512i a[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const std::uint16_t* from = row(first + i);
        a[i] = from == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi32(mask, from + d);
      }
      transpose_16(a, [=](int i, __m512i lanes) {
        if (i < words) _mm512_storeu_si512(out + (d / 2 + i) * kRowBlock + first, lanes);
      });
    }
  }
}

/// out[i / 2][d]: value d of rows i and i + 1, for i < count rounded up to even; zero where row(i)
/// is null.
template <class Rows>
void pack_pairs(const Rows& row, std::int64_t count, std::int64_t dim, std::uint32_t* out) {
  const auto wide = [](const std::uint16_t* from, std::int64_t d) {
    return from == nullptr ? _mm512_setzero_si512()
                           : _mm512_cvtepu16_epi32(VecAvx512::half(from + d));
  };
  for (std::int64_t i = 0; i < count; i += 2, out += dim) {
    const std::uint16_t* low = row(i);
    const std::uint16_t* high = row(i + 1);
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      const __m512i word = _mm512_or_si512(wide(low, d), _mm512_slli_epi32(wide(high, d), 16));
      _mm512_storeu_si512(out + d, word);
    }
  }
}

/// rows(i)[d] = in[d][i] * scale[i] as bfloat16, for dim values of kRowBlock rows; the reverse of
/// pack_lanes.
template <class Rows>
void store_lanes(const float* in, const float* scale, std::int64_t dim, const Rows& rows) {
  for (std::int64_t first = 0; first < kRowBlock; first += kLanes) {
    if (rows(first) == nullptr) return;
    const __m512 by = _mm512_loadu_ps(scale + first);
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      __m512i a[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512 lanes = _mm512_loadu_ps(in + (d + i) * kRowBlock + first);
        a[i] = _mm512_castps_si512(_mm512_mul_ps(lanes, by));
      }
      transpose_16(a, [&](int i, __m512i values) {
        std::uint16_t* to = rows(first + i);
        if (to != nullptr) VecAvx512::store_bf16(to + d, _mm512_castsi512_ps(values));
      });
    }
  }
}

/// 2^x, relative error 2e-7, for x <= 127; 0 below -150; NaN for NaN.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0F), x);  // NaN, the second operand, stays
  const __m512 whole = VecAvx512::rint(x);
  const __m512 part = _mm512_sub_ps(x, whole);
  // Taylor's polynomial of 2^part, |part| <= 1/2: what is left out is below 1.3e-7.
  __m512 y = _mm512_set1_ps(1.5403530e-4F);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.3333558e-3F));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.6181291e-3F));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2F));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1F));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1F));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(y, whole);
}

constexpr float kLog2E = 1.44269504F, kLn2 = 0.693147181F;

/// Two rows of 16 lanes as bfloat16, lane by lane: word i = (low[i], high[i]).
inline __m512i pair_lanes(__m512 low, __m512 high) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(load_512(kOrder), narrow_two(low, high));
}

/// Which keys the rows of a block see.
class Sight {
 public:
  Sight(const AttentionJob& job, std::int64_t row, std::int64_t rows)
      : vecs_(static_cast<int>((rows + kLanes - 1) / kLanes)) {
    for (std::int64_t i = 0; i < kRowBlock; ++i) {
      const std::int64_t query = (row + i) / job.group;
      begin_[i] = i < rows ? job.begin[query] : 0;
      end_[i] = i < rows ? job.end[query] : 0;
      if (i >= rows) continue;
      of_all_.add(begin_[i], end_[i], i == 0);
      of_vec_[i / kLanes].add(begin_[i], end_[i], i % kLanes == 0);
    }
  }

  /// The first block of keys that some row sees, and behind the last key.
  std::int64_t first_block() const { return of_all_.first / kKeyBlock * kKeyBlock; }
  std::int64_t last() const { return of_all_.last; }
  /// Vectors of lanes that hold rows.
  int vecs() const { return vecs_; }
  /// Whether every row sees all keys [begin, end).
  bool all(std::int64_t begin, std::int64_t end) const {
    return of_all_.latest_begin <= begin && end <= of_all_.earliest_end;
  }

  struct Vecs {
    int begin, end;
  };
  /// A run of vectors without which no row sees any of the keys [begin, end).
  Vecs vecs(std::int64_t begin, std::int64_t end) const {
    Vecs run = {0, vecs_};
    while (run.begin < run.end && !of_vec_[run.begin].any(begin, end)) ++run.begin;
    while (run.begin < run.end && !of_vec_[run.end - 1].any(begin, end)) --run.end;
    return run;
  }
  __mmask16 lanes(int v, std::int64_t key) const {
    const __m512i at = _mm512_set1_epi32(static_cast<int>(key));
    const __mmask16 begun = _mm512_cmple_epi32_mask(load_512(begin_ + v * kLanes), at);
    return _mm512_mask_cmpgt_epi32_mask(begun, load_512(end_ + v * kLanes), at);
  }

 private:
  /// Bounds of the runs of some rows.
  struct Bounds {
    std::int64_t first = 0, last = 0, latest_begin = 0, earliest_end = 0;

    void add(std::int64_t begin, std::int64_t end, bool is_first) {
      if (is_first) {
        *this = {begin, end, begin, end};
        return;
      }
      if (begin < first) first = begin;
      if (end > last) last = end;
      if (begin > latest_begin) latest_begin = begin;
      if (end < earliest_end) earliest_end = end;
    }
    bool any(std::int64_t begin, std::int64_t end) const { return first < end && begin < last; }
  };

  alignas(64) std::int32_t begin_[kRowBlock];
  alignas(64) std::int32_t end_[kRowBlock];
  int vecs_;
  Bounds of_all_, of_vec_[kRowVecs];
};

/// out[key - keys.begin][row] = a(key) b[][row] over `dim` values, for the lanes that see the key;
/// a begins with the first key.
inline void score_keys(const Sight& sight, Left a, const std::uint32_t* lanes, std::int64_t dim,
                       std::int64_t key, std::int64_t count, float* out) {
  constexpr std::int64_t kTile = 12;
  for (std::int64_t i = 0; i < count; i += kTile, a.data += kTile * a.row) {
    const std::int64_t rows = count - i < kTile ? count - i : kTile;
    const Sight::Vecs run = sight.vecs(key + i, key + i + rows);
    const std::int64_t skip = run.begin * kLanes;
    multiply<false>(a, rows, {lanes + skip, kRowBlock}, run.end - run.begin, dim / 2,
                    {out + i * kRowBlock + skip, kRowBlock});
  }
}

}  // namespace
}  // namespace quantal

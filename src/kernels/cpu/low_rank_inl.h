// Products with matrices of low rank (low_rank_kernels.h) for any vector type T (vec_*.h) that also
// has
//   static constexpr int kTall, kWide;  // a tile of kTall x kWide sums fits into registers
#pragma once

#include "kernels/cpu/low_rank_kernels.h"
#include "kernels/cpu/stats_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

template <int kNumber>
struct Count {
  static constexpr int kCount = kNumber;
};

/// body(Count, first) for 0 .. n in tiles of kMost, then half as many, ...
template <int kMost, class Body>
void for_tiles(std::int64_t n, std::int64_t first, Body body) {
  for (; first + kMost <= n; first += kMost) body(Count<kMost>{}, first);
  if constexpr (kMost > 1) {
    if (first < n) for_tiles<kMost / 2>(n, first, body);
  }
}

// ------------------------------------------------------------------ reduce

template <class T, FloatKind kKind, int kRows, int kRanks>
[[gnu::noinline]] void reduce_tile(const std::uint8_t* x, std::int64_t n, const float* p,
                                   std::int64_t rank, float scale, float* t) {
  using F = typename T::F;
  F sums[kRows][kRanks];
  for (auto& row : sums) {
    for (F& s : row) s = T::zero();
  }
  const auto add = [&](const F* values, const auto& load) {
    for (int r = 0; r < kRanks; ++r) {
      const F weight = load(p + r * n);
      for (int m = 0; m < kRows; ++m) sums[m][r] = T::fma(values[m], weight, sums[m][r]);
    }
  };
  F values[kRows];
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    for (int m = 0; m < kRows; ++m) values[m] = load_kind<T>(kKind, element<kKind>(x, m * n + c));
    add(values, [c](const float* row) { return T::load(row + c); });
  }
  if (c < n) {
    const auto left = static_cast<int>(n - c);
    for (int m = 0; m < kRows; ++m) {
      values[m] = load_kind_n<T>(kKind, element<kKind>(x, m * n + c), left);
    }
    add(values, [c, left](const float* row) { return T::load_n(row + c, left); });
  }
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) t[m * rank + r] = scale * T::sum(sums[m][r]);
  }
}

template <class T, FloatKind kKind>
void reduce(const void* x, std::int64_t rows, std::int64_t n, const float* p, std::int64_t rank,
            float scale, float* t) {
  for_tiles<T::kTall>(rows, 0, [&](auto tall, std::int64_t m) {
    for_tiles<T::kWide>(rank, 0, [&](auto wide, std::int64_t r) {
      reduce_tile<T, kKind, decltype(tall)::kCount, decltype(wide)::kCount>(
          element<kKind>(x, m * n), n, p + r * n, rank, scale, t + m * rank + r);
    });
  });
}

// ------------------------------------------------------------------ expand

/// Columns of a tile: kVectors vectors, or `left` < 16 in one.
template <class T, FloatKind kKind, int kRows, int kVectors>
[[gnu::noinline]] void expand_tile(const float* t, std::int64_t rank, const float* p,
                                   std::int64_t n, std::int64_t left, std::uint8_t* y) {
  using F = typename T::F;
  F sums[kRows][kVectors];
  for (auto& row : sums) {
    for (F& s : row) s = T::zero();
  }
  const bool whole = kVectors > 1 || left >= kLanes;
  for (std::int64_t r = 0; r < rank; ++r) {
    F weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] =
          whole ? T::load(p + r * n + v * kLanes) : T::load_n(p + r * n, static_cast<int>(left));
    }
    for (int m = 0; m < kRows; ++m) {
      const F value = T::set1(t[m * rank + r]);
      for (int v = 0; v < kVectors; ++v) sums[m][v] = T::fma(value, weights[v], sums[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      std::uint8_t* to = y + (m * n + v * kLanes) * float_bytes(kKind);
      const F old = whole ? load_kind<T>(kKind, to) : load_kind_n<T>(kKind, to, left);
      store_kind_n<T>(kKind, T::add(old, sums[m][v]), to, whole ? kLanes : left);
    }
  }
}

/// Calls tile(Count of vectors, first column, columns that are left) for columns [begin, end).
template <class T, class Tile>
void for_columns(std::int64_t begin, std::int64_t end, Tile tile) {
  const std::int64_t whole = (end - begin) / kLanes;
  for_tiles<T::kWide>(whole, 0, [&](auto wide, std::int64_t v) {
    tile(wide, begin + v * kLanes, end - begin - v * kLanes);
  });
  const std::int64_t rest = begin + whole * kLanes;
  if (rest < end) tile(Count<1>{}, rest, end - rest);
}

template <class T, FloatKind kKind>
void expand(const float* t, std::int64_t rows, std::int64_t rank, const float* p, std::int64_t n,
            void* y) {
  for_columns<T>(0, n, [&](auto wide, std::int64_t c, std::int64_t left) {
    for_tiles<T::kTall>(rows, 0, [&](auto tall, std::int64_t m) {
      expand_tile<T, kKind, decltype(tall)::kCount, decltype(wide)::kCount>(
          t + m * rank, rank, p + c, n, left,
          static_cast<std::uint8_t*>(y) + (m * n + c) * float_bytes(kKind));
    });
  });
}

// ------------------------------------------------------------------ outer

/// Rows whose columns of x stay in the first-level cache while all ranks use them.
constexpr std::int64_t kOuterRows = 64;

template <class T, FloatKind kKind, int kRanks, int kVectors>
[[gnu::noinline]] void outer_tile(const float* t, std::int64_t rows, std::int64_t rank,
                                  const std::uint8_t* x, std::int64_t n, std::int64_t left,
                                  bool first, float* sums) {
  using F = typename T::F;
  const bool whole = kVectors > 1 || left >= kLanes;
  const auto count = static_cast<int>(min64(left, kLanes));
  F acc[kRanks][kVectors];
  for (int r = 0; r < kRanks; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const float* from = sums + r * n + v * kLanes;
      acc[r][v] = first ? T::zero() : whole ? T::load(from) : T::load_n(from, count);
    }
  }
  for (std::int64_t m = 0; m < rows; ++m) {
    F values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const std::uint8_t* from = x + (m * n + v * kLanes) * float_bytes(kKind);
      values[v] = whole ? load_kind<T>(kKind, from) : load_kind_n<T>(kKind, from, left);
    }
    for (int r = 0; r < kRanks; ++r) {
      const F weight = T::set1(t[m * rank + r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = T::fma(weight, values[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRanks; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T::store_n(sums + r * n + v * kLanes, acc[r][v], whole ? static_cast<int>(kLanes) : count);
    }
  }
}

template <class T, FloatKind kKind>
void outer(const float* t, std::int64_t rows, std::int64_t rank, const void* x, std::int64_t n,
           std::int64_t begin, std::int64_t end, float* sums) {
  for_columns<T>(begin, end, [&](auto wide, std::int64_t c, std::int64_t left) {
    for (std::int64_t m = 0; m < rows || m == 0; m += kOuterRows) {
      for_tiles<T::kTall>(rank, 0, [&](auto tall, std::int64_t r) {
        outer_tile<T, kKind, decltype(tall)::kCount, decltype(wide)::kCount>(
            t + m * rank + r, min64(kOuterRows, rows - m), rank, element<kKind>(x, m * n + c), n,
            left, m == 0, sums + r * n + c);
      });
    }
  });
}

// ------------------------------------------------------------------ any element type

template <class T>
constexpr LowRankKernels low_rank_kernels() {
  return {[](FloatKind kind, const void* x, std::int64_t rows, std::int64_t n, const float* p,
             std::int64_t rank, float scale, float* t) noexcept {
            with_element(
                kind, [&]<FloatKind kKind>() { reduce<T, kKind>(x, rows, n, p, rank, scale, t); });
          },
          [](FloatKind kind, const float* t, std::int64_t rows, std::int64_t rank, const float* p,
             std::int64_t n, void* y) noexcept {
            with_element(kind,
                         [&]<FloatKind kKind>() { expand<T, kKind>(t, rows, rank, p, n, y); });
          },
          [](FloatKind kind, const float* t, std::int64_t rows, std::int64_t rank, const void* x,
             std::int64_t n, std::int64_t begin, std::int64_t end, float* sums) noexcept {
            with_element(kind, [&]<FloatKind kKind>() {
              outer<T, kKind>(t, rows, rank, x, n, begin, end, sums);
            });
          }};
}

}  // namespace
}  // namespace quantal

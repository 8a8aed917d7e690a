// Attention of few rows (attention_kernels.h) for any vector type T (vec_*.h) that also has
//   static constexpr int kTile;  // accumulators that fit into registers, 4 or 16
//   static void sums(const F* a, float scale, float* out);  // out[i] = scale * sum(a[i])
//
// Defined order of every sum, the same on every instruction set: a score accumulates dims i, i +
// 16,
// ... in lane i with fma and adds the lanes as T::sum does; weights are added as add_weights does;
// an output accumulates its keys in their order with fma, where a block has one row even keys and
// odd keys apart in each kKeyBlock keys; parts are added in the order of their keys.
#pragma once

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/stats_inl.h"

namespace quantal {
namespace {  // NOLINT: internal linkage on purpose

inline std::int64_t max64(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

/// Keys whose vectors stay in the first-level cache while all rows use them.
constexpr std::int64_t kKeyBlock = 64;
/// Rows that share a loaded key, and the row blocks of a job.
constexpr int kRowBlock = 4;
constexpr float kLeastScore = -3.4028235e38F;  // below every number but -infinity

/// e^x for x <= 0 with a relative error below 2^-23, 0 below ln 2^-126, NaN for NaN. With n =
/// round(x / ln 2) and r = x - n ln 2 it is 2^n (1 + r + r^2 P(r)); P is the minimax polynomial of
/// degree 4 (3e-9). Adding kShift leaves n + 127 in the low bits.
template <class T>
typename T::F exp_negative(typename T::F x) {
  using F = typename T::F;
  constexpr float kShift = 12582912.0F + 127.0F;  // 1.5 * 2^23
  const F shifted = T::fma(x, T::set1(1.44269504F), T::set1(kShift));
  const F n = T::sub(shifted, T::set1(kShift));
  F r = T::fma(n, T::set1(-0.693147182F), x);
  r = T::fma(n, T::set1(1.90465421e-9F), r);  // ln 2 less its nearest float32
  F p = T::fma(T::set1(0.00138145406F), r, T::set1(0.00836874545F));
  p = T::fma(p, r, T::set1(0.0416683890F));
  p = T::fma(p, r, T::set1(0.166665211F));
  p = T::fma(p, r, T::set1(0.499999940F));
  p = T::fma(p, r, T::set1(1.0F));
  p = T::fma(p, r, T::set1(1.0F));
  const F power = T::cast_f(T::template shl<23>(T::cast_u(shifted)));
  return T::select(T::lt(x, T::set1(-87.33654F)), T::zero(), T::mul(p, power));
}

/// Rows [first, first + rows) of a job over the keys of a chunk. The score of row i and key j is
/// scores[j * width + i].
struct RowBlock {
  int first, rows;
  int width;      ///< 1, 2 or 4
  float* scores;  ///< whole vectors
};

constexpr int score_width(int rows) { return rows == 3 ? 4 : rows; }

/// A chunk: keys [begin, end) of a job.
struct Chunk {
  const AttentionJob& job;
  std::int64_t begin, end;
  const float* q;  ///< [rows, dim]
  float* part;

  std::int64_t size() const { return end - begin; }
  /// A row sees keys [first(row), last(row)) of the chunk.
  std::int64_t first(int row) const { return inside(job.begin[row / job.group]); }
  std::int64_t last(int row) const { return inside(job.end[row / job.group]); }
  std::int64_t inside(std::int64_t key) const { return key < begin ? 0 : min64(key, end) - begin; }
  float* out(int row) const { return part + row * job.dim; }
  float* most() const { return part + job.rows * job.dim; }
  float* sum() const { return most() + FewRowsAttention::kRows; }
};

/// Calls fn with the number of rows, 1 to kRowBlock, as a type.
template <int kRows>
struct Rows {
  static constexpr int kCount = kRows;
};
template <class Fn>
void with_rows(int rows, Fn fn) {
  switch (rows) {
    case 1:
      return fn(Rows<1>{});
    case 2:
      return fn(Rows<2>{});
    case 3:
      return fn(Rows<3>{});
    default:
      return fn(Rows<4>{});
  }
}

/// Asks for `dim` elements of the key or value that many keys after the one at `data`: between two
/// tokens the weights of a model pass through the caches, so that keys come from memory.
template <FloatKind kKind>
void prefetch_ahead(const std::uint8_t* data, std::int64_t key_bytes, std::int64_t dim,
                    std::int64_t count) {
  constexpr std::int64_t kBytes = 8192, kLine = 64;
  const std::uint8_t* from = data + kBytes / (dim * float_bytes(kKind)) * key_bytes;
  for (std::int64_t byte = 0; byte < count * float_bytes(kKind); byte += kLine) {
    __builtin_prefetch(from + byte);
  }
}

// ------------------------------------------------------------------ scores

/// acc[key * width + row] of kKeys keys.
template <class T, FloatKind kKind, int kRows, int kKeys>
void dot_keys(const std::uint8_t* const* keys, const float* q, std::int64_t dim,
              typename T::F* acc) {
  using F = typename T::F;
  constexpr int kWidth = score_width(kRows);
  F sums[kKeys][kRows];
  for (auto& key : sums) {
    for (F& s : key) s = T::zero();
  }
  for (std::int64_t d = 0; d < dim; d += kLanes) {
    F rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = T::load(q + r * dim + d);
    for (int k = 0; k < kKeys; ++k) {
      const F key = load_kind<T>(kKind, keys[k] + d * float_bytes(kKind));
      for (int r = 0; r < kRows; ++r) sums[k][r] = T::fma(key, rows[r], sums[k][r]);
    }
  }
  for (int k = 0; k < kKeys; ++k) {
    for (int r = 0; r < kWidth; ++r) acc[k * kWidth + r] = r < kRows ? sums[k][r] : T::zero();
  }
}

/// Scores of keys [from, to) of the chunk, from a multiple of kKeyBlock; up to the next multiple of
/// 16 keys they are those of the last key.
template <class T, FloatKind kKind, int kRows>
void score_keys(const Chunk& chunk, const RowBlock& block, std::int64_t from, std::int64_t to) {
  using F = typename T::F;
  constexpr int kWidth = score_width(kRows);
  constexpr int kKeys = T::kTile / kWidth;
  constexpr int kStep = kKeys > 8 ? 8 : kKeys;  // pointers that fit into registers
  const AttentionJob& job = chunk.job;
  const float* q = chunk.q + block.first * job.dim;
  const std::int64_t key_bytes = job.k_stride * float_bytes(kKind);
  for (std::int64_t j = from; j < to; j += kKeys) {
    const std::uint8_t* keys[kKeys];
    for (int k = 0; k < kKeys; ++k) {
      keys[k] = element<kKind>(job.k, (chunk.begin + min64(j + k, to - 1)) * job.k_stride);
      if (block.first == 0) prefetch_ahead<kKind>(keys[k], key_bytes, job.dim, job.dim);
    }
    F acc[T::kTile];
    for (int k = 0; k < kKeys; k += kStep) {
      dot_keys<T, kKind, kRows, kStep>(keys + k, q, job.dim, acc + k * kWidth);
    }
    T::sums(acc, job.scale, block.scores + j * kWidth);
  }
}

// ------------------------------------------------------------------ weights

/// Scores become exp(score - most); most and sum of every row of the block.
template <class T>
void weigh_scores(const Chunk& chunk, const RowBlock& block) {
  using F = typename T::F;
  const std::int64_t count = (chunk.size() * block.width + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < block.width; ++r) {
    const int row = r < block.rows ? block.first + r : block.first;
    const auto hide = [&](std::int64_t j) {
      block.scores[j * block.width + r] = -__builtin_inff();
    };
    for (std::int64_t j = 0; j < chunk.first(row); ++j) hide(j);
    for (std::int64_t j = chunk.last(row); j * block.width < count; ++j) hide(j);
  }
  float lanes[kLanes];
  F most = T::set1(kLeastScore);
  for (std::int64_t i = 0; i < count; i += kLanes) most = T::max(T::load(block.scores + i), most);
  T::store(lanes, most);
  for (int i = block.width; i < kLanes; ++i) {
    float& row = lanes[i % block.width];
    row = lanes[i] > row ? lanes[i] : row;
  }
  for (int r = 0; r < block.rows; ++r) chunk.most()[block.first + r] = lanes[r];
  for (int i = block.width; i < kLanes; ++i) lanes[i] = lanes[i % block.width];
  most = T::load(lanes);
  F sum = T::zero();
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const F weight = exp_negative<T>(T::sub(T::load(block.scores + i), most));
    T::store(block.scores + i, weight);
    sum = T::add(sum, weight);
  }
  T::store(lanes, sum);
  for (int i = block.width; i < kLanes; ++i) lanes[i % block.width] += lanes[i];
  for (int r = 0; r < block.rows; ++r) chunk.sum()[block.first + r] = lanes[r];
}

// ------------------------------------------------------------------ values

/// Weights of some keys for consecutive rows, and their values.
struct Weighted {
  const float* weights;  ///< of row r and key j at j * width + r
  int width;
  const std::uint8_t* values;
  std::int64_t value_bytes;  ///< from one key to the next
  std::int64_t keys;
};

/// out[r * dim ..] += sum_j weight[r, j] value[j] of kVectors vectors.
template <class T, FloatKind kKind, int kRows, int kVectors>
void add_vectors(const Weighted& w, std::int64_t dim, float* out) {
  using F = typename T::F;
  constexpr int kApart = kRows == 1 ? 2 : 1;  // chains of sums, so that one does not wait
  F acc[kApart][kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      acc[0][r][v] = T::load(out + r * dim + v * kLanes);
      if constexpr (kApart == 2) acc[1][r][v] = T::zero();
    }
  }
  const auto add_key = [&](std::int64_t j, F(&sums)[kRows][kVectors]) {
    F weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = T::set1(w.weights[j * w.width + r]);
    const std::uint8_t* values = w.values + j * w.value_bytes;
    prefetch_ahead<kKind>(values, w.value_bytes, dim, kVectors * kLanes);
    for (int v = 0; v < kVectors; ++v) {
      const F value = load_kind<T>(kKind, values + v * kLanes * float_bytes(kKind));
      for (int r = 0; r < kRows; ++r) sums[r][v] = T::fma(weight[r], value, sums[r][v]);
    }
  };
  std::int64_t j = 0;
  for (; j + kApart <= w.keys; j += kApart) {
    for (int a = 0; a < kApart; ++a) add_key(j + a, acc[a]);
  }
  if (j < w.keys) add_key(j, acc[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      F sum = acc[0][r][v];
      if constexpr (kApart == 2) sum = T::add(sum, acc[1][r][v]);
      T::store(out + r * dim + v * kLanes, sum);
    }
  }
}

/// The same of all vectors from `d` on, kVectors at a time as long as there are as many.
template <class T, FloatKind kKind, int kRows, int kVectors>
void add_values(Weighted w, std::int64_t dim, std::int64_t d, float* out) {
  constexpr std::int64_t kStep = kVectors * kLanes;
  for (; d + kStep <= dim; d += kStep, w.values += kStep * float_bytes(kKind)) {
    add_vectors<T, kKind, kRows, kVectors>(w, dim, out + d);
  }
  if constexpr (kVectors > 1) {
    if (d < dim) add_values<T, kKind, kRows, kVectors / 2>(w, dim, d, out);
  }
}

/// Adds keys [from, to) of the chunk to rows [row, row + kRows) of a block.
template <class T, FloatKind kKind, int kRows>
void add_keys(const Chunk& chunk, const RowBlock& block, int row, std::int64_t from,
              std::int64_t to) {
  if (from >= to) return;
  const AttentionJob& job = chunk.job;
  const std::int64_t stride = job.v_stride;
  const Weighted w{.weights = block.scores + from * block.width + row,
                   .width = block.width,
                   .values = element<kKind>(job.v, (chunk.begin + from) * stride),
                   .value_bytes = stride * float_bytes(kKind),
                   .keys = to - from};
  add_values<T, kKind, kRows, T::kTile / (kRows <= 2 ? 2 : 4)>(w, job.dim, 0,
                                                               chunk.out(block.first + row));
}

/// Adds keys [from, to): those that all rows see at once, the others row by row, since a weight of
/// 0 would not hide an infinite value.
template <class T, FloatKind kKind, int kRows>
void add_block(const Chunk& chunk, const RowBlock& block, std::int64_t from, std::int64_t to) {
  std::int64_t begin = from, end = to;  // what all rows see
  for (int r = 0; r < kRows; ++r) {
    begin = max64(begin, chunk.first(block.first + r));
    end = min64(end, chunk.last(block.first + r));
  }
  if (begin >= end) begin = end = to;
  for (int r = 0; r < kRows; ++r) {
    const int row = block.first + r;
    add_keys<T, kKind, 1>(chunk, block, r, max64(from, chunk.first(row)),
                          min64(begin, chunk.last(row)));
  }
  add_keys<T, kKind, kRows>(chunk, block, 0, begin, end);
  for (int r = 0; r < kRows; ++r) {
    add_keys<T, kKind, 1>(chunk, block, r, end, min64(to, chunk.last(block.first + r)));
  }
}

// ------------------------------------------------------------------ a chunk, and all of them

inline std::int64_t row_offset(const AttentionJob& job, const AttentionRows& rows, int row) {
  return row / job.group * rows.position + row % job.group * rows.head;
}

template <class T, FloatKind kKind>
void widen_queries(const AttentionJob& job, float* q) {
  for (int r = 0; r < job.rows; ++r) {
    const std::uint8_t* from = element<kKind>(job.q.data, row_offset(job, job.q, r));
    for (std::int64_t d = 0; d < job.dim; d += kLanes) {
      T::store(q + r * job.dim + d, load_kind<T>(kKind, from + d * float_bytes(kKind)));
    }
  }
}

/// Narrows keys [begin, end) to those that queries see, in front to whole blocks, so that no sum
/// changes: of a window, or behind padding, few are left.
inline void skip_hidden_keys(const AttentionJob& job, std::int64_t& begin, std::int64_t& end) {
  std::int64_t first = end, last = begin;
  for (std::int64_t query = 0; query * job.group < job.rows; ++query) {
    if (job.begin[query] == job.end[query]) continue;
    first = min64(first, job.begin[query]);
    last = max64(last, job.end[query]);
  }
  end = min64(end, last);
  begin += max64(0, min64(first, end) - begin) / kKeyBlock * kKeyBlock;
}

template <class T, FloatKind kKind>
void attention_part(const AttentionJob& job, std::int64_t begin, std::int64_t end, float* scratch,
                    float* part) {
  skip_hidden_keys(job, begin, end);
  float* scores = scratch + FewRowsAttention::kRows * FewRowsAttention::kMaxDim;
  const Chunk chunk{.job = job, .begin = begin, .end = end, .q = scratch, .part = part};
  widen_queries<T, kKind>(job, scratch);
  for (std::int64_t i = 0; i < job.rows * job.dim; i += kLanes) T::store(part + i, T::zero());
  RowBlock blocks[FewRowsAttention::kRows / kRowBlock];
  int count = 0;
  for (int row = 0; row < job.rows; row += kRowBlock) {
    const auto rows = static_cast<int>(min64(kRowBlock, job.rows - row));
    blocks[count++] = {.first = row,
                       .rows = rows,
                       .width = score_width(rows),
                       .scores = scores + row * FewRowsAttention::kKeys};
  }
  /// body(block, Rows, from, to)
  const auto for_blocks_of_keys = [&](auto body) {
    for (std::int64_t from = 0; from < chunk.size(); from += kKeyBlock) {
      const std::int64_t to = min64(from + kKeyBlock, chunk.size());
      for (int b = 0; b < count; ++b) {
        with_rows(blocks[b].rows, [&](auto rows) { body(blocks[b], rows, from, to); });
      }
    }
  };
  for_blocks_of_keys([&](const RowBlock& block, auto rows, std::int64_t from, std::int64_t to) {
    score_keys<T, kKind, decltype(rows)::kCount>(chunk, block, from, to);
  });
  for (int b = 0; b < count; ++b) weigh_scores<T>(chunk, blocks[b]);
  for_blocks_of_keys([&](const RowBlock& block, auto rows, std::int64_t from, std::int64_t to) {
    add_block<T, kKind, decltype(rows)::kCount>(chunk, block, from, to);
  });
}

/// Row r of all parts; the sum of its weights in every lane.
template <class T, FloatKind kKind>
void finish_row(const AttentionJob& job, const float* parts, std::int64_t count, int row) {
  using F = typename T::F;
  const std::int64_t step = FewRowsAttention::part_floats(job.rows, job.dim);
  const std::int64_t vectors = job.dim / kLanes;
  const float* each_most = parts + job.rows * job.dim + row;
  float most = kLeastScore;
  for (std::int64_t c = 0; c < count; ++c) {
    const float m = each_most[c * step];
    most = m > most ? m : most;
  }
  F sum = T::zero();
  F totals[FewRowsAttention::kMaxDim / kLanes];
  for (std::int64_t v = 0; v < vectors; ++v) totals[v] = T::zero();
  for (std::int64_t c = 0; c < count; ++c) {
    const float* part = parts + c * step;
    const F weight = exp_negative<T>(T::set1(each_most[c * step] - most));
    sum = T::fma(weight, T::set1(each_most[c * step + FewRowsAttention::kRows]), sum);
    for (std::int64_t v = 0; v < vectors; ++v) {
      totals[v] = T::fma(weight, T::load(part + row * job.dim + v * kLanes), totals[v]);
    }
  }
  const std::int64_t query = row / job.group;
  const bool blind = job.begin[query] == job.end[query];  // no keys: 0
  const F inverse = blind ? T::zero() : T::div(T::set1(1.0F), sum);
  auto* out =
      static_cast<std::uint8_t*>(job.out.data) + row_offset(job, job.out, row) * float_bytes(kKind);
  for (std::int64_t v = 0; v < vectors; ++v) {
    store_kind_n<T>(kKind, T::mul(totals[v], inverse), out + v * kLanes * float_bytes(kKind),
                    kLanes);
  }
  if (job.lse != nullptr) {
    float lanes[kLanes];
    T::store(lanes, sum);
    job.lse[query + row % job.group * job.lse_head] =
        blind ? -__builtin_inff() : most + __builtin_logf(lanes[0]);
  }
}

template <class T, FloatKind kKind>
void attention_finish(const AttentionJob& job, const float* parts, std::int64_t count) {
  for (int r = 0; r < job.rows; ++r) finish_row<T, kKind>(job, parts, count, r);
}

// ------------------------------------------------------------------ any element type

template <class T>
void few_rows_part(const AttentionJob& job, FloatKind kind, std::int64_t begin, std::int64_t end,
                   float* scratch, float* part) noexcept {
  with_element(
      kind, [&]<FloatKind kKind>() { attention_part<T, kKind>(job, begin, end, scratch, part); });
}

template <class T>
void few_rows_finish(const AttentionJob& job, FloatKind kind, const float* parts,
                     std::int64_t count) noexcept {
  with_element(kind, [&]<FloatKind kKind>() { attention_finish<T, kKind>(job, parts, count); });
}

}  // namespace
}  // namespace quantal

// Problems of attention in any layout.
#pragma once

#include <array>
#include <utility>

#include "kernels/support.h"
#include "quantal/attention.h"

namespace quantal::testing {

/// How a tensor [batch, heads, positions, dim] lies in memory.
enum class Layout {
  kDense,           ///< [batch, heads, positions, dim]
  kPositionsFirst,  ///< [batch, positions, heads, dim], as projections give it
  kCache,           ///< [batch, heads, positions + 3, dim + 16]: more room than positions
};

/// A tensor: its values [batch, heads, positions, dim] and its bytes; those between are 0xFF, which
/// is NaN.
struct AttentionTensor {
  std::int64_t batch, heads, positions, dim;
  DType dtype;
  AttentionStrides strides{};
  std::vector<float> values;
  std::vector<std::uint8_t> bytes;

  AttentionTensor(std::array<std::int64_t, 4> sizes, DType type, Layout layout)
      : batch(sizes[0]), heads(sizes[1]), positions(sizes[2]), dim(sizes[3]), dtype(type) {
    if (layout == Layout::kPositionsFirst) {
      strides = {positions * heads * dim, dim, heads * dim};
    } else {
      const std::int64_t more = layout == Layout::kCache ? 1 : 0;
      strides.position = dim + 16 * more;
      strides.head = (positions + 3 * more) * strides.position;
      strides.batch = heads * strides.head;
    }
    values.resize(static_cast<std::size_t>(batch * heads * positions * dim));
    bytes.assign(static_cast<std::size_t>(batch * strides.batch) * dtype_size(dtype), 0xFF);
  }
  std::size_t index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d = 0) const {
    return static_cast<std::size_t>(((b * heads + h) * positions + i) * dim + d);
  }
  std::size_t byte(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return static_cast<std::size_t>(b * strides.batch + h * strides.head + i * strides.position) *
           dtype_size(dtype);
  }
  template <class Fn>
  void for_rows(Fn fn) const {
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t i = 0; i < positions; ++i) fn(index(b, h, i), byte(b, h, i));
      }
    }
  }
  /// Writes the values; they become what the type holds.
  void to_bytes() {
    for_rows([&](std::size_t value, std::size_t byte) {
      narrow_from_f32(dtype, values.data() + value, dim, bytes.data() + byte);
      widen_to_f32(dtype, bytes.data() + byte, dim, values.data() + value);
    });
  }
  void from_bytes() {
    for_rows([&](std::size_t value, std::size_t byte) {
      widen_to_f32(dtype, bytes.data() + byte, dim, values.data() + value);
    });
  }
  /// Are all bytes that belong to no value as they were?
  bool gaps_intact() const {
    std::vector<std::uint8_t> copy = bytes;
    for_rows([&](std::size_t, std::size_t byte) {
      std::fill_n(copy.begin() + static_cast<std::ptrdiff_t>(byte),
                  dim * static_cast<std::int64_t>(dtype_size(dtype)), std::uint8_t{0xFF});
    });
    return std::all_of(copy.begin(), copy.end(), [](std::uint8_t v) { return v == 0xFF; });
  }
  AttentionInput input() const { return {bytes.data(), strides}; }
  AttentionOutput output() { return {bytes.data(), strides}; }
};

struct AttentionProblem {
  AttentionShape shape;
  DType dtype;
  AttentionTensor q, k, v;
  std::vector<std::int32_t> run_begin, run_end;  ///< [batch, queries], or none

  AttentionProblem(const AttentionShape& s, DType type, Layout layout, std::uint64_t seed)
      : shape(s),
        dtype(type),
        q({s.batch, s.heads, s.queries, s.dim}, type, layout),
        k({s.batch, s.kv_heads, s.keys, s.dim}, type, layout),
        v({s.batch, s.kv_heads, s.keys, s.dim}, type, layout) {
    Random random(seed);
    for (AttentionTensor* t : {&q, &k, &v}) {
      for (float& x : t->values) x = random.uniform(-2, 2);
      t->to_bytes();
    }
  }
  /// Windows of any size anywhere, some of them empty.
  void see_random_runs(std::uint64_t seed) {
    Random random(seed);
    for (std::int64_t i = 0; i < shape.batch * shape.queries; ++i) {
      const std::int64_t begin = random.below(shape.keys + 1);
      const std::int64_t end = begin + random.below(shape.keys - begin + 1);
      run_begin.push_back(static_cast<std::int32_t>(begin));
      run_end.push_back(static_cast<std::int32_t>(random.below(4) == 0 ? begin : end));
    }
  }
  AttentionShape shape_with_runs() const {
    AttentionShape s = shape;
    if (!run_begin.empty()) {
      s.run_begin = run_begin.data();
      s.run_end = run_end.data();
    }
    return s;
  }
  /// The keys that a query sees.
  std::pair<std::int64_t, std::int64_t> seen(std::int64_t b, std::int64_t i) const {
    const auto at = static_cast<std::size_t>(b * shape.queries + i);
    if (!run_begin.empty()) return {run_begin[at], run_end[at]};
    return {0, shape.causal ? shape.keys - shape.queries + i + 1 : shape.keys};
  }
  std::string describe() const {
    const auto n = [](std::int64_t v) { return std::to_string(v); };
    return "batch " + n(shape.batch) + " heads " + n(shape.heads) + "/" + n(shape.kv_heads) +
           " queries " + n(shape.queries) + " keys " + n(shape.keys) + " dim " + n(shape.dim) +
           (shape.causal        ? " causal "
            : run_begin.empty() ? " "
                                : " runs ") +
           std::string(dtype_name(dtype));
  }
};

struct AttentionResult {
  AttentionTensor out;
  std::vector<float> lse;

  bool operator==(const AttentionResult& other) const {
    return out.bytes == other.out.bytes &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

inline AttentionResult run_attention(const AttentionProblem& p, const Executor& executor,
                                     Layout layout = Layout::kDense) {
  const AttentionShape& s = p.shape;
  AttentionResult result{
      .out = AttentionTensor({s.batch, s.heads, s.queries, s.dim}, p.dtype, layout),
      .lse = std::vector<float>(static_cast<std::size_t>(s.batch * s.heads * s.queries))};
  attention(p.shape_with_runs(), p.dtype, p.q.input(), p.k.input(), p.v.input(),
            result.out.output(), result.lse.data(), executor);
  result.out.from_bytes();
  return result;
}

}  // namespace quantal::testing

// Problems of attention, the formula in float64 and how far float32 may be from it.
#pragma once

#include <array>
#include <cmath>

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
  std::string describe() const {
    const auto n = [](std::int64_t v) { return std::to_string(v); };
    return "batch " + n(shape.batch) + " heads " + n(shape.heads) + "/" + n(shape.kv_heads) +
           " queries " + n(shape.queries) + " keys " + n(shape.keys) + " dim " + n(shape.dim) +
           (shape.causal ? " causal " : " ") + std::string(dtype_name(dtype));
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
  attention(s, p.dtype, p.q.input(), p.k.input(), p.v.input(), result.out.output(),
            result.lse.data(), executor);
  result.out.from_bytes();
  return result;
}

/// One row by the formula, and how far float32 may be from it.
struct AttentionRow {
  std::vector<double> out, out_error;
  double lse = 0, lse_error = 0;

  AttentionRow(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i)
      : out(static_cast<std::size_t>(p.shape.dim)), out_error(out) {
    const AttentionShape& s = p.shape;
    const std::int64_t kv = h / (s.heads / s.kv_heads);
    const std::int64_t seen = s.causal ? s.keys - s.queries + i + 1 : s.keys;
    std::vector<double> score(static_cast<std::size_t>(seen)), error(score);
    const float* q = p.q.values.data() + p.q.index(b, h, i);
    double most = -INFINITY;
    for (std::size_t j = 0; j < score.size(); ++j) {
      const float* k = p.k.values.data() + p.k.index(b, kv, static_cast<std::int64_t>(j));
      double sum = 0, size = 0;
      for (std::int64_t d = 0; d < s.dim; ++d) {
        const double product = static_cast<double>(q[d]) * static_cast<double>(k[d]);
        sum += product;
        size += std::fabs(product);
      }
      score[j] = static_cast<double>(s.scale) * sum;
      // dim / 16 products added in a lane, 4 sums of lanes, the scale
      error[j] = static_cast<double>(s.dim / 16 + 5) * kUnit * std::fabs(s.scale) * size;
      most = std::max(most, score[j]);
    }
    weigh(p, b, kv, score, error, most);
  }

 private:
  static constexpr double kUnit = 0x1p-24;

  void weigh(const AttentionProblem& p, std::int64_t b, std::int64_t kv,
             const std::vector<double>& score, const std::vector<double>& error, double most) {
    double sum = 0, sum_error = 0;
    std::vector<double> size(out.size());
    for (std::size_t j = 0; j < score.size(); ++j) {
      const double weight = std::exp(score[j] - most);
      // the score, its difference from the largest, the exponential below 2^-23
      const double moved = error[j] + kUnit * (most - score[j]) + 2 * kUnit;
      sum += weight;
      sum_error += weight * moved;
      const float* v = p.v.values.data() + p.v.index(b, kv, static_cast<std::int64_t>(j));
      for (std::size_t d = 0; d < out.size(); ++d) {
        out[d] += weight * static_cast<double>(v[d]);
        size[d] += weight * std::fabs(static_cast<double>(v[d]));
        out_error[d] += weight * moved * std::fabs(static_cast<double>(v[d]));
      }
    }
    // Sums of at most 1024 keys, and of parts with a weight each; the quotient.
    const auto keys = static_cast<double>(score.size());
    const double added = (std::min(keys, 1024.0) + 3 * keys / 512 + 16) * kUnit;
    for (std::size_t d = 0; d < out.size(); ++d) {
      out[d] /= sum;
      out_error[d] = (out_error[d] + added * size[d]) / sum +
                     std::fabs(out[d]) * (sum_error / sum + added + 2 * kUnit);
      out_error[d] += rounding(p.dtype, std::fabs(out[d]) + out_error[d]);
    }
    lse = most + std::log(sum);
    lse_error = sum_error / sum + added + 4 * kUnit * (1 + std::fabs(most) + std::fabs(lse));
  }
  static double rounding(DType dtype, double v) {
    if (dtype == DType::kF32) return v * kUnit;
    if (dtype == DType::kBF16) return v * 0x1p-8;
    return v * 0x1p-11 + 0x1p-25;
  }
};

/// Every output and lse within the bound of its row.
inline ::testing::AssertionResult near_formula(const AttentionProblem& p,
                                               const AttentionResult& result) {
  const AttentionShape& s = p.shape;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t i = 0; i < s.queries; ++i) {
        const AttentionRow row(p, b, h, i);
        const auto fail = [&](const std::string& what, double got, double expected, double error) {
          return ::testing::AssertionFailure()
                 << p.describe() << ": " << what << " of head " << h << " query " << i << " is "
                 << got << ", expected " << expected << " within " << error;
        };
        const double lse = static_cast<double>(
            result.lse[static_cast<std::size_t>((b * s.heads + h) * s.queries + i)]);
        if (!(std::fabs(lse - row.lse) <= row.lse_error)) {
          return fail("lse", lse, row.lse, row.lse_error);
        }
        for (std::int64_t d = 0; d < s.dim; ++d) {
          const auto at = static_cast<std::size_t>(d);
          const auto got = static_cast<double>(result.out.values[result.out.index(b, h, i, d)]);
          if (!(std::fabs(got - row.out[at]) <= row.out_error[at])) {
            return fail("out " + std::to_string(d), got, row.out[at], row.out_error[at]);
          }
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace quantal::testing

// Attention by its formula in float64, and how far float32 may be from it.
#pragma once

#include <cmath>

#include "kernels/attention_support.h"

namespace quantal::testing {

/// One row by the formula, and how far float32 may be from it.
struct AttentionRow {
  std::vector<double> out, out_error;
  double lse = 0, lse_error = 0;

  AttentionRow(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i)
      : out(static_cast<std::size_t>(p.shape.dim)), out_error(out) {
    const AttentionShape& s = p.shape;
    const std::int64_t kv = h / (s.heads / s.kv_heads);
    const auto [begin, end] = p.seen(b, i);
    if (begin == end) {
      lse = -INFINITY;
      return;
    }
    std::vector<double> score(static_cast<std::size_t>(end - begin)), error(score);
    const float* q = p.q.values.data() + p.q.index(b, h, i);
    double most = -INFINITY;
    for (std::size_t j = 0; j < score.size(); ++j) {
      const float* k = p.k.values.data() + p.k.index(b, kv, begin + static_cast<std::int64_t>(j));
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
    weigh(p, p.v.values.data() + p.v.index(b, kv, begin), score, error, most);
  }

 private:
  static constexpr double kUnit = 0x1p-24;

  void weigh(const AttentionProblem& p, const float* values, const std::vector<double>& score,
             const std::vector<double>& error, double most) {
    double sum = 0, sum_error = 0;
    std::vector<double> size(out.size());
    for (std::size_t j = 0; j < score.size(); ++j) {
      const double weight = std::exp(score[j] - most);
      // the score, its difference from the largest, the exponential below 2^-23
      const double moved = error[j] + kUnit * (most - score[j]) + 2 * kUnit;
      sum += weight;
      sum_error += weight * moved;
      const float* v = values + j * out.size();
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
        if (!(lse == row.lse || std::fabs(lse - row.lse) <= row.lse_error)) {
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

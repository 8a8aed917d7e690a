// Attention of many rows of bfloat16 and its gradients against float64.
#include <array>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/support.h"
#include "quantal/attention.h"

namespace quantal {
namespace {

using testing::OddExecutor;
using testing::Random;
using testing::ThreadExecutor;

/// Whether heads stand inside positions ([batch, positions, heads, dim], as projections leave them)
/// or around them.
enum class Order { kPositions, kHeads };

/// Values [batch, heads, positions, dim] in bfloat16.
struct Heads {
  std::int64_t heads, positions, dim;
  AttentionStrides strides;
  std::vector<std::uint16_t> values;

  Heads(std::int64_t batch, std::int64_t h, std::int64_t n, std::int64_t d, Order order)
      : heads(h), positions(n), dim(d), values(static_cast<std::size_t>(batch * h * n * d)) {
    strides = order == Order::kHeads ? AttentionStrides{h * n * d, n * d, d}
                                     : AttentionStrides{h * n * d, d, h * d};
  }
  void fill(Random& random, float size) {
    for (auto& v : values) v = f32_to_bf16(random.uniform(-size, size));
  }
  std::size_t index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t x) const {
    return static_cast<std::size_t>(b * strides.batch + h * strides.head + i * strides.position +
                                    x);
  }
  double at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t x) const {
    return static_cast<double>(bf16_to_f32(values[index(b, h, i, x)]));
  }
  AttentionInput in() const { return {values.data(), strides}; }
  AttentionOutput out() { return {values.data(), strides}; }
};

struct Case {
  std::int64_t batch, heads, kv_heads, queries, keys, dim;
  bool causal;
  Order order = Order::kPositions;
  bool runs = false;  ///< random ones, some of them empty
};

std::string name_of(const Case& c) {
  std::string name;
  for (const std::int64_t n : {c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.dim}) {
    name += std::to_string(n) + " ";
  }
  return name + (c.causal ? "causal" : c.runs ? "runs" : "all");
}

/// Inputs, results and gradients of one attention.
struct Problem {
  AttentionShape shape;
  Heads q, k, v, out, grad, dq, dk, dv;
  std::vector<float> lse;
  std::vector<std::int32_t> begin, end;

  Problem(const Case& c, std::uint64_t seed, float size = 2.0F)
      : shape{c.batch, c.heads, c.kv_heads, c.queries,
              c.keys,  c.dim,   c.causal,   1 / std::sqrt(static_cast<float>(c.dim))},
        q(c.batch, c.heads, c.queries, c.dim, c.order),
        k(c.batch, c.kv_heads, c.keys, c.dim, c.order),
        v(k),
        out(q),
        grad(q),
        dq(q),
        dk(k),
        dv(k),
        lse(static_cast<std::size_t>(c.batch * c.heads * c.queries)) {
    Random random(seed);
    for (Heads* x : {&q, &k}) x->fill(random, size);
    for (Heads* x : {&v, &grad, &out, &dq, &dk, &dv}) x->fill(random, 1.0F);
    for (std::int64_t i = 0; c.runs && i < c.batch * c.queries; ++i) {
      begin.push_back(static_cast<std::int32_t>(random.below(c.keys)));
      end.push_back(begin.back() +
                    static_cast<std::int32_t>(random.below(c.keys - begin.back() + 1)));
    }
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  AttentionShape with_runs() const {
    AttentionShape s = shape;
    if (!begin.empty()) {
      s.run_begin = begin.data();
      s.run_end = end.data();
    }
    return s;
  }
  void forward(const Executor& executor) {
    attention(with_runs(), DType::kBF16, q.in(), k.in(), v.in(), out.out(), lse.data(), executor);
  }
  void backward(const Executor& executor) {
    attention_backward(with_runs(), DType::kBF16,
                       {q.in(), k.in(), v.in(), out.in(), lse.data(), grad.in()},
                       {dq.out(), dk.out(), dv.out()}, executor);
  }
};

constexpr double kRound = 0x1p-8;  // unit roundoff of bfloat16

/// A float64 sum and what roundings may add to it.
struct Bounded {
  double value = 0, error = 0;
  void add(double product, double relative) {
    value += product;
    error += std::abs(product) * relative;
  }
};

void expect_near(const Heads& actual, const std::vector<Bounded>& expected, const char* what) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double y = static_cast<double>(bf16_to_f32(actual.values[i]));
    const double allowed = expected[i].error + std::abs(expected[i].value) * kRound + 1e-6;
    ASSERT_LE(std::abs(y - expected[i].value), allowed) << what << " at " << i << " is " << y;
  }
}

/// One query of one head in float64.
class Query {
 public:
  Query(const Problem& run, std::int64_t b, std::int64_t h, std::int64_t i)
      : run_(run), b_(b), h_(h), i_(i), kv_(h / (run.shape.heads / run.shape.kv_heads)) {
    const AttentionShape& s = run.shape;
    seen_ = s.causal ? s.keys - s.queries + 1 + i : s.keys;
    if (!run.begin.empty()) {
      begin_ = run.begin[static_cast<std::size_t>(b * s.queries + i)];
      seen_ = run.end[static_cast<std::size_t>(b * s.queries + i)];
    }
    double total = 0;
    for (std::int64_t j = begin_; j < seen_; ++j) {
      double sum = 0, size = 0;
      for (std::int64_t x = 0; x < s.dim; ++x) {
        const double product = run.q.at(b, h, i, x) * run.k.at(b, kv_, j, x);
        sum += product;
        size += std::abs(product);
      }
      scores_.push_back(static_cast<double>(s.scale) * sum);
      // float32 sums of dim products, then of base 2 and of the exponential
      drift_.push_back(0x1p-18 * (1 + static_cast<double>(s.scale) * size));
      total += std::exp(scores_.back());
    }
    lse_ = std::log(total);
  }

  double lse() const { return lse_; }
  double lse_drift() const {
    return drift_.empty() ? 0 : *std::max_element(drift_.begin(), drift_.end());
  }

  void add_out(std::vector<Bounded>& out) const {
    each_key([&](std::int64_t j, double p, double rounding) {
      for (std::int64_t x = 0; x < run_.shape.dim; ++x) {
        out[run_.out.index(b_, h_, i_, x)].add(p * run_.v.at(b_, kv_, j, x), rounding);
      }
    });
  }

  void add_gradients(std::vector<Bounded>& dq, std::vector<Bounded>& dk,
                     std::vector<Bounded>& dv) const {
    double mean = 0, mean_size = 0;
    for (std::int64_t x = 0; x < run_.shape.dim; ++x) {
      const double product = run_.grad.at(b_, h_, i_, x) * run_.out.at(b_, h_, i_, x);
      mean += product;
      mean_size += std::abs(product);
    }
    each_key([&](std::int64_t j, double p, double rounding) {
      double sum = 0, size = mean_size;
      for (std::int64_t x = 0; x < run_.shape.dim; ++x) {
        const double product = run_.grad.at(b_, h_, i_, x) * run_.v.at(b_, kv_, j, x);
        sum += product;
        size += std::abs(product);
        dv[run_.v.index(b_, kv_, j, x)].add(p * run_.grad.at(b_, h_, i_, x), rounding);
      }
      const double scale = static_cast<double>(run_.shape.scale), ds = p * (sum - mean) * scale;
      const double lost = p * size * scale * 0x1p-18;  // the difference of two float32 sums
      for (std::int64_t x = 0; x < run_.shape.dim; ++x) {
        const double key = run_.k.at(b_, kv_, j, x), query = run_.q.at(b_, h_, i_, x);
        Bounded& of_q = dq[run_.q.index(b_, h_, i_, x)];
        Bounded& of_k = dk[run_.k.index(b_, kv_, j, x)];
        of_q.add(ds * key, rounding);
        of_k.add(ds * query, rounding);
        of_q.error += lost * std::abs(key);
        of_k.error += lost * std::abs(query);
      }
    });
  }

 private:
  template <class Body>
  void each_key(Body body) const {
    for (std::int64_t j = begin_; j < seen_; ++j) {
      const auto at = static_cast<std::size_t>(j - begin_);
      body(j, std::exp(scores_[at] - lse_), kRound + drift_[at] + lse_drift());
    }
  }

  const Problem& run_;
  const std::int64_t b_, h_, i_, kv_;
  std::int64_t begin_ = 0, seen_ = 0;
  std::vector<double> scores_, drift_;
  double lse_ = 0;
};

void check(Problem& run) {
  std::vector<Bounded> out(run.q.values.size()), dq(out), dk(run.k.values.size()), dv(dk);
  for (std::int64_t b = 0; b < run.shape.batch; ++b) {
    for (std::int64_t h = 0; h < run.shape.heads; ++h) {
      for (std::int64_t i = 0; i < run.shape.queries; ++i) {
        const Query query(run, b, h, i);
        query.add_out(out);
        query.add_gradients(dq, dk, dv);
        const auto at = (b * run.shape.heads + h) * run.shape.queries + i;
        const auto lse = static_cast<double>(run.lse[static_cast<std::size_t>(at)]);
        if (std::isinf(query.lse())) {  // no keys
          ASSERT_EQ(lse, query.lse());
          continue;
        }
        ASSERT_NEAR(lse, query.lse(), query.lse_drift() + 0x1p-22 * std::abs(query.lse()));
      }
    }
  }
  expect_near(run.out, out, "out");
  expect_near(run.dq, dq, "dq");
  expect_near(run.dk, dk, "dk");
  expect_near(run.dv, dv, "dv");
}

class AttentionBlocks : public testing::KernelSetTest {
 protected:
  void SetUp() override {
    const auto sets = available_cpu_kernels();
    if (std::find(sets.begin(), sets.end(), "avx512bf16") == sets.end()) {
      GTEST_SKIP() << "no AVX512_BF16 here";
    }
    select_cpu_kernels("avx512bf16");
  }
};

const Case kCases[] = {
    {1, 1, 1, 1, 1, 16, true},
    {2, 3, 1, 64, 64, 64, true},
    {1, 4, 2, 33, 97, 48, true},
    {1, 2, 2, 130, 130, 80, true, Order::kHeads},
    {2, 2, 1, 17, 200, 32, false},
    {1, 8, 8, 5, 129, 128, false, Order::kHeads},
    {1, 5, 1, 70, 71, 112, true},
    {1, 1, 1, 3, 66, 256, true},
    {3, 3, 3, 65, 65, 96, false},
    {2, 2, 1, 100, 150, 64, false, Order::kPositions, true},
    {1, 3, 1, 20, 700, 32, false, Order::kHeads, true},
    // Few rows, forward by the kernels of attention_test.cpp
    {2, 4, 1, 4, 90, 64, false, Order::kPositions, true},
    {4, 1, 1, 5, 1300, 32, false, Order::kHeads, true},
};

TEST_F(AttentionBlocks, ResultsAndGradients) {
  for (const Case& c : kCases) {
    SCOPED_TRACE(name_of(c));
    Problem run(c, 7);
    run.forward(serial_executor());
    run.backward(serial_executor());
    check(run);
  }
}

TEST_F(AttentionBlocks, BitsDoNotDependOnThreads) {
  for (const Case& c : kCases) {
    SCOPED_TRACE(name_of(c));
    Problem one(c, 9), odd(c, 9), four(c, 9);
    one.forward(serial_executor());
    one.backward(serial_executor());
    odd.forward(OddExecutor());
    odd.backward(OddExecutor());
    four.forward(ThreadExecutor());
    four.backward(ThreadExecutor());
    for (const Problem* other : {&odd, &four}) {
      EXPECT_EQ(other->lse, one.lse);
      EXPECT_EQ(other->out.values, one.out.values);
      EXPECT_EQ(other->dq.values, one.dq.values);
      EXPECT_EQ(other->dk.values, one.dk.values);
      EXPECT_EQ(other->dv.values, one.dv.values);
    }
  }
}

TEST_F(AttentionBlocks, LargeScoresDoNotOverflow) {
  Problem run({1, 2, 1, 40, 90, 64, true}, 11, 2000.0F);
  run.forward(serial_executor());
  run.backward(serial_executor());
  for (const Heads* x : {&run.out, &run.dq, &run.dk, &run.dv}) {
    for (const std::uint16_t v : x->values) ASSERT_TRUE(std::isfinite(bf16_to_f32(v)));
  }
  for (const float v : run.lse) EXPECT_TRUE(std::isfinite(v));
}

TEST_F(AttentionBlocks, HiddenKeysHaveNoWeight) {
  Problem run({1, 1, 1, 20, 80, 64, true}, 13);
  run.forward(serial_executor());
  const auto out = run.out.values;
  run.k.values[run.k.index(0, 0, 79, 0)] = 0x7FC0;  // NaN; the last query alone sees it
  run.forward(serial_executor());
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t x = 0; x < 64; ++x) {
      const std::size_t at = run.out.index(0, 0, i, x);
      if (i < 19) ASSERT_EQ(run.out.values[at], out[at]) << i << " " << x;
      if (i == 19) ASSERT_TRUE(std::isnan(bf16_to_f32(run.out.values[at]))) << x;
    }
  }
}

TEST_F(AttentionBlocks, RunsBeyondTheKeysAreRefused) {
  Problem run({1, 2, 1, 20, 30, 32, false, Order::kPositions, true}, 17);
  const auto message = [&](std::int32_t begin, std::int32_t end) -> std::string {
    run.begin[3] = begin;
    run.end[3] = end;
    try {
      run.forward(serial_executor());
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message(0, 31), "attention: run 3 is 0 to 31, expected 0 <= begin <= end <= 30");
  EXPECT_EQ(message(-1, 3), "attention: run 3 is -1 to 3, expected 0 <= begin <= end <= 30");
  EXPECT_EQ(message(5, 3), "attention: run 3 is 5 to 3, expected 0 <= begin <= end <= 30");
  EXPECT_EQ(message(30, 30), "");
  run.shape.causal = true;
  EXPECT_EQ(message(0, 3),
            "attention: runs are given with causal true and run_end not null, expected false and "
            "not null");
}

TEST(RunsOfMask, OnesThatStandTogether) {
  struct Row {
    std::vector<std::uint8_t> mask;
    std::int32_t begin, end;  // -1: no run
  };
  const Row rows[] = {
      {{1, 1, 1, 1, 1}, 0, 5},   {{0, 0, 0, 0, 0}, 5, 5},   {{1, 1, 0, 0, 0}, 0, 2},
      {{0, 0, 0, 1, 1}, 3, 5},   {{0, 2, 255, 1, 0}, 1, 4}, {{1, 0, 1, 0, 0}, -1, -1},
      {{1, 0, 0, 0, 1}, -1, -1}, {{0, 1, 0, 0, 1}, -1, -1},
  };
  for (const Row& row : rows) {
    std::int32_t begin = -2, end = -2;
    const bool run = runs_of_mask(row.mask.data(), 1, 5, 5, &begin, &end);
    EXPECT_EQ(run, row.begin >= 0);
    if (run) EXPECT_EQ((std::pair{begin, end}), (std::pair{row.begin, row.end}));
  }
  const std::vector<std::uint8_t> two = {1, 0, 0, 9, 1, 1, 0, 9};  // stride 4
  std::int32_t begin[2], end[2];
  ASSERT_TRUE(runs_of_mask(two.data(), 2, 3, 4, begin, end));
  EXPECT_EQ(end[0], 1);
  EXPECT_EQ(end[1], 2);
}

TEST_F(AttentionBlocks, NoQueriesGiveNoGradient) {
  Problem run({1, 2, 1, 0, 10, 32, true}, 15);
  run.forward(serial_executor());
  run.backward(serial_executor());
  for (const Heads* x : {&run.dk, &run.dv}) {
    for (const std::uint16_t v : x->values) ASSERT_EQ(v, 0);
  }
}

}  // namespace
}  // namespace quantal

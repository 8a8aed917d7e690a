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
};

std::string name_of(const Case& c) {
  std::string name;
  for (const std::int64_t n : {c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.dim}) {
    name += std::to_string(n) + " ";
  }
  return name + (c.causal ? "causal" : "all");
}

/// Inputs, results and gradients of one attention.
struct Problem {
  AttentionShape shape;
  Heads q, k, v, out, grad, dq, dk, dv;
  std::vector<float> lse;

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
  }
  void forward(const Executor& executor) {
    attention(shape, DType::kBF16, q.in(), k.in(), v.in(), out.out(), lse.data(), executor);
  }
  void backward(const Executor& executor) {
    attention_backward(shape, DType::kBF16,
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
    double total = 0;
    for (std::int64_t j = 0; j < seen_; ++j) {
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
  double lse_drift() const { return *std::max_element(drift_.begin(), drift_.end()); }

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
    for (std::int64_t j = 0; j < seen_; ++j) {
      const auto at = static_cast<std::size_t>(j);
      body(j, std::exp(scores_[at] - lse_), kRound + drift_[at] + lse_drift());
    }
  }

  const Problem& run_;
  const std::int64_t b_, h_, i_, kv_;
  std::int64_t seen_ = 0;
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
        ASSERT_NEAR(static_cast<double>(run.lse[static_cast<std::size_t>(at)]), query.lse(),
                    query.lse_drift() + 0x1p-22 * std::abs(query.lse()));
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
    {1, 1, 1, 1, 1, 16, true},     {2, 3, 1, 64, 64, 64, true},
    {1, 4, 2, 33, 97, 48, true},   {1, 2, 2, 130, 130, 80, true, Order::kHeads},
    {2, 2, 1, 17, 200, 32, false}, {1, 8, 8, 5, 129, 128, false, Order::kHeads},
    {1, 5, 1, 70, 71, 112, true},  {1, 1, 1, 3, 66, 256, true},
    {3, 3, 3, 65, 65, 96, false},
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

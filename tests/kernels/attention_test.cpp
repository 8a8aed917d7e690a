// Attention of few rows: every kernel set against the formula in float64, and against each other.
#include "kernels/attention_formula.h"

namespace quantal::testing {
namespace {

class Attention : public KernelSetTest {};

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr Layout kLayouts[] = {Layout::kDense, Layout::kPositionsFirst, Layout::kCache};

AttentionShape shape_of(std::int64_t group, std::int64_t queries, std::int64_t keys,
                        std::int64_t dim, bool causal) {
  return {.batch = 2,
          .heads = 2 * group,
          .kv_heads = 2,
          .queries = queries,
          .keys = keys,
          .dim = dim,
          .causal = causal,
          .scale = 1.0F / std::sqrt(static_cast<float>(dim))};
}

/// Calls fn with every shape of few rows among these.
template <class Fn>
void for_shapes(const std::vector<std::int64_t>& keys, const std::vector<std::int64_t>& dims,
                Fn fn) {
  for (std::int64_t dim : dims) {
    for (std::int64_t n : keys) {
      for (std::int64_t group : {1, 3, 4, 8}) {
        for (std::int64_t queries : {1, 2, 5}) {
          for (bool causal : {false, true}) {
            if (group * queries > 16 || (causal && queries > n)) continue;
            fn(shape_of(group, queries, n, dim, causal));
          }
        }
      }
    }
  }
}

/// All kernel sets agree bit for bit, and the first with the formula.
void check(const AttentionProblem& p, Layout out_layout) {
  std::vector<AttentionResult> results;
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    results.push_back(run_attention(p, serial_executor(), out_layout));
    ASSERT_TRUE(results.back() == results.front()) << name << " " << p.describe();
  }
  ASSERT_TRUE(near_formula(p, results.front()));
  ASSERT_TRUE(results.front().out.gaps_intact()) << p.describe();
}

TEST_F(Attention, ShortContexts) {
  std::uint64_t seed = 0;
  for_shapes({1, 2, 15, 17, 100}, {16, 48, 64, 80, 128, 256}, [&](const AttentionShape& shape) {
    for (DType dtype : kDTypes) {
      ++seed;
      check(AttentionProblem(shape, dtype, kLayouts[seed / 3 % 3], seed), kLayouts[seed / 2 % 3]);
    }
  });
}

TEST_F(Attention, LongContextsAreCutIntoChunks) {
  std::uint64_t seed = 1000;
  for_shapes({1023, 1025, 3000}, {80}, [&](const AttentionShape& shape) {
    ++seed;
    check(AttentionProblem(shape, kDTypes[seed % 3], kLayouts[seed / 3 % 3], seed),
          kLayouts[seed / 2 % 3]);
  });
}

TEST_F(Attention, QueriesSeeRuns) {
  std::uint64_t seed = 2000;
  for_shapes({1, 40, 700, 2100}, {32}, [&](const AttentionShape& shape) {
    if (shape.causal) return;
    for (int repeat = 0; repeat < 4; ++repeat) {
      ++seed;
      AttentionProblem p(shape, kDTypes[seed % 3], kLayouts[seed / 3 % 3], seed);
      p.see_random_runs(seed);
      check(p, kLayouts[seed / 2 % 3]);
    }
  });
}

/// A window has the bits that its keys alone have where it begins with a block of keys.
TEST_F(Attention, HiddenKeysLeaveNoTrace) {
  AttentionProblem p(shape_of(3, 1, 900, 64, false), DType::kF32, Layout::kDense, 3);
  for (AttentionTensor* t : {&p.k, &p.v}) {
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t j = 0; j < 900; ++j) {
          if (j < 640 || j >= 731) t->values[t->index(b, h, j)] = j % 2 == 0 ? NAN : INFINITY;
        }
      }
    }
    t->to_bytes();
  }
  p.run_begin = {640, 640};
  p.run_end = {731, 731};
  AttentionProblem alone(shape_of(3, 1, 91, 64, false), DType::kF32, Layout::kDense, 3);
  alone.q = p.q;
  const auto window = [&](const AttentionTensor& from, AttentionTensor& to) {
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t h = 0; h < 2; ++h) {
        std::copy_n(from.values.begin() + static_cast<std::ptrdiff_t>(from.index(b, h, 640)),
                    91 * 64, to.values.begin() + static_cast<std::ptrdiff_t>(to.index(b, h, 0)));
      }
    }
    to.to_bytes();
  };
  window(p.k, alone.k);
  window(p.v, alone.v);
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    EXPECT_TRUE(run_attention(p, serial_executor()) == run_attention(alone, serial_executor()))
        << name;
  }
}

/// Chunks of 513 keys, rounded to 528, leave the 40th none.
TEST_F(Attention, RoundedChunksMayBeFewer) {
  check(AttentionProblem(shape_of(1, 1, 40 * 513, 16, false), DType::kF32, Layout::kDense, 9),
        Layout::kDense);
}

TEST_F(Attention, EveryTypeAndLayout) {
  for (DType dtype : kDTypes) {
    for (Layout layout : kLayouts) {
      check(AttentionProblem(shape_of(3, 5, 77, 48, true), dtype, layout, 7), layout);
    }
  }
}

TEST_F(Attention, BitsDoNotDependOnThreads) {
  for (std::int64_t keys : {300, 2500}) {
    AttentionShape shape = shape_of(3, 2, keys, 64, true);
    shape.batch = 3;
    const AttentionProblem p(shape, DType::kBF16, Layout::kDense, 5);
    for (std::string_view name : available_cpu_kernels()) {
      select_cpu_kernels(name);
      const AttentionResult serial = run_attention(p, serial_executor());
      for (int threads : {1, 2, 5}) {
        EXPECT_TRUE(run_attention(p, ThreadExecutor(threads)) == serial) << name << " " << threads;
      }
      EXPECT_TRUE(run_attention(p, OddExecutor()) == serial) << name;
    }
  }
}

TEST_F(Attention, LseIsOptional) {
  const AttentionProblem p(shape_of(2, 1, 40, 32, false), DType::kF32, Layout::kDense, 6);
  const AttentionResult expected = run_attention(p, serial_executor());
  AttentionTensor out = expected.out;
  std::fill(out.bytes.begin(), out.bytes.end(), std::uint8_t{0});
  attention(p.shape, p.dtype, p.q.input(), p.k.input(), p.v.input(), out.output(), nullptr,
            serial_executor());
  EXPECT_EQ(out.bytes, expected.out.bytes);
}

TEST_F(Attention, SmallProblemsStayOnTheCallingThread) {
  class Counter final : public Executor {
   public:
    int num_threads() const override { return 8; }
    void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t /*grain*/,
                      const std::function<void(std::int64_t, std::int64_t)>& body) const override {
      ++calls;
      body(begin, end);
    }
    mutable int calls = 0;
  };
  const auto calls = [](std::int64_t keys) {
    const Counter counter;
    run_attention({shape_of(1, 1, keys, 64, false), DType::kF32, Layout::kDense, 1}, counter);
    return counter.calls;
  };
  EXPECT_EQ(calls(16), 0);
  EXPECT_EQ(calls(900), 1);
}

}  // namespace
}  // namespace quantal::testing

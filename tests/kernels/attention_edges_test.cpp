// Attention of few rows where numbers are extreme, and what it refuses.
#include "kernels/attention_formula.h"

namespace quantal::testing {
namespace {

class AttentionEdges : public KernelSetTest {
 protected:
  /// fn() under every kernel set.
  template <class Fn>
  static void for_sets(Fn fn) {
    for (std::string_view name : available_cpu_kernels()) {
      select_cpu_kernels(name);
      SCOPED_TRACE(name);
      fn();
    }
  }
};

constexpr AttentionShape kShape = {.batch = 1,
                                   .heads = 2,
                                   .kv_heads = 1,
                                   .queries = 1,
                                   .keys = 20,
                                   .dim = 16,
                                   .causal = false,
                                   .scale = 1.0F};

/// Two keys with scores 0 and -x and values 0 and 1: out = w / (1 + w), w = e^-x.
TEST_F(AttentionEdges, ExponentialIsAccurateToTheSmallestNormalNumber) {
  AttentionShape shape = kShape;
  shape.batch = 9000;
  shape.heads = 1;
  shape.keys = 2;
  AttentionProblem p(shape, DType::kF32, Layout::kDense, 1);
  for (AttentionTensor* t : {&p.q, &p.k, &p.v}) std::fill(t->values.begin(), t->values.end(), 0.0F);
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    p.q.values[p.q.index(b, 0, 0)] = 1;
    p.k.values[p.k.index(b, 0, 1)] = -0.01F * static_cast<float>(b);
    p.v.values[p.v.index(b, 0, 1)] = 1;
  }
  for (AttentionTensor* t : {&p.q, &p.k, &p.v}) t->to_bytes();
  for_sets([&] {
    const AttentionResult result = run_attention(p, serial_executor());
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      const double w = std::exp(static_cast<double>(p.k.values[p.k.index(b, 0, 1)]));
      const auto got = static_cast<double>(result.out.values[result.out.index(b, 0, 0)]);
      if (w < 0x1p-126) {
        ASSERT_EQ(got, 0) << b;
      } else {  // 2^-23 of the exponential; a sum and a quotient of two roundings where w counts
        const double others = w < 0x1p-25 ? 0 : 3 * 0x1p-24;
        ASSERT_NEAR(got * (1 + w) / w, 1, 0x1p-23 + others + w * 0x1p-23) << b;
      }
    }
  });
}

TEST_F(AttentionEdges, ScoresOfTenThousandDoNotOverflow) {
  for (float score : {1e4F, -1e4F}) {
    AttentionShape shape = kShape;
    shape.keys = 1500;
    AttentionProblem p(shape, DType::kF32, Layout::kDense, 2);
    for (float& x : p.q.values) x = score / 16;
    for (float& x : p.k.values) x = 1;
    for (std::size_t i = 0; i < p.k.values.size(); i += 32) p.k.values[i] = 1.001F;
    for (AttentionTensor* t : {&p.q, &p.k}) t->to_bytes();
    for_sets([&] { EXPECT_TRUE(near_formula(p, run_attention(p, serial_executor()))); });
  }
}

TEST_F(AttentionEdges, ScaleMayBeNegativeOrZero) {
  for (float scale : {-0.7F, 0.0F}) {
    AttentionShape shape = kShape;
    shape.scale = scale;
    const AttentionProblem p(shape, DType::kF16, Layout::kDense, 3);
    for_sets([&] { EXPECT_TRUE(near_formula(p, run_attention(p, serial_executor()))); });
  }
}

/// A key that is not a number, or infinite, makes every row that sees it so, and no other.
TEST_F(AttentionEdges, NanReachesTheRowsThatSeeIt) {
  for (std::int64_t keys : {20, 1300}) {
    AttentionShape shape = kShape;
    shape.heads = 3;
    shape.queries = 5;
    shape.keys = keys;
    shape.causal = true;
    for (bool in_value : {false, true}) {
      AttentionProblem p(shape, DType::kBF16, Layout::kDense, 4);
      const AttentionProblem clean = p;
      AttentionTensor& t = in_value ? p.v : p.k;
      t.values[t.index(0, 0, keys - 2, 3)] = in_value ? INFINITY : NAN;  // seen by queries 3 and 4
      t.to_bytes();
      for_sets([&] {
        const AttentionResult expected = run_attention(clean, serial_executor());
        const AttentionResult result = run_attention(p, serial_executor());
        for (std::int64_t h = 0; h < 3; ++h) {
          for (std::int64_t i = 0; i < 5; ++i) {
            const std::size_t at = result.out.index(0, h, i, 3);
            if (i < 3) {
              EXPECT_EQ(result.out.values[at], expected.out.values[at]);
            } else if (in_value) {
              EXPECT_EQ(result.out.values[at], INFINITY);
            } else {
              EXPECT_TRUE(std::isnan(result.out.values[at]));
            }
          }
        }
      });
    }
  }
}

/// exp(-inf - most) is 0; where every score is -inf it is NaN, as the formula has it.
TEST_F(AttentionEdges, ScoresOfMinusInfinity) {
  for (std::int64_t keys : {20, 1100}) {
    AttentionShape shape = kShape;
    shape.keys = keys;
    for (std::int64_t finite : {std::int64_t{0}, std::int64_t{3}}) {
      AttentionProblem p(shape, DType::kF32, Layout::kDense, 5);
      for (float& x : p.q.values) x = 1;
      for (std::size_t i = 0; i < p.k.values.size(); i += 16) p.k.values[i] = -INFINITY;
      if (finite != 0) p.k.values[p.k.index(0, 0, finite)] = 1;
      for (AttentionTensor* t : {&p.q, &p.k}) t->to_bytes();
      for_sets([&] {
        const AttentionResult result = run_attention(p, serial_executor());
        for (std::int64_t d = 0; d < shape.dim; ++d) {
          const float got = result.out.values[result.out.index(0, 1, 0, d)];
          if (finite == 0) {
            EXPECT_TRUE(std::isnan(got));
          } else {
            EXPECT_EQ(got, p.v.values[p.v.index(0, 0, finite, d)]);
          }
        }
        if (finite == 0) EXPECT_EQ(result.lse[0], -INFINITY);
      });
    }
  }
}

TEST_F(AttentionEdges, NothingToDo) {
  AttentionShape shape = kShape;
  shape.batch = 0;
  attention(shape, DType::kF32, {}, {}, {}, {}, nullptr, serial_executor());
  shape = kShape;
  shape.queries = 0;
  attention(shape, DType::kF32, {}, {}, {}, {}, nullptr, serial_executor());
}

TEST_F(AttentionEdges, Refusals) {
  EXPECT_EQ(attention_refusal(kShape, DType::kBF16, false), "");
  EXPECT_EQ(attention_refusal(kShape, DType::kF64, false),
            "dtype is f64, expected f32, f16 or bf16");
  AttentionShape shape = kShape;
  for (std::int64_t dim : {72, 272}) {
    shape.dim = dim;
    EXPECT_EQ(attention_refusal(shape, DType::kF32, false),
              "dim is " + std::to_string(dim) + ", expected a multiple of 16 up to 256");
  }
  shape = kShape;
  shape.keys = (std::int64_t{1} << 30) + 1;
  EXPECT_EQ(attention_refusal(shape, DType::kF32, false),
            "keys is 1073741825, expected <= 1073741824");
}

TEST_F(AttentionEdges, RefusalsOfManyRowsAndOfGradients) {
  AttentionShape shape = kShape;
  shape.heads = 3;
  shape.queries = 5;
  EXPECT_EQ(attention_refusal(shape, DType::kF32, false), "");
  EXPECT_EQ(attention_refusal(shape, DType::kF32, true), "dtype is f32, expected bf16");
  shape.queries = 6;
  const std::string few = "queries is 6, expected <= 5 where 3 heads share keys and values";
  EXPECT_EQ(attention_refusal(shape, DType::kF32, false),
            few + "; for more, dtype is f32, expected bf16");
  select_cpu_kernels("scalar");
  const std::string many = "kernel set is scalar, expected avx512bf16";
  EXPECT_EQ(attention_refusal(shape, DType::kBF16, false), few + "; for more, " + many);
  EXPECT_EQ(attention_refusal(shape, DType::kBF16, true), many);
}

/// The message of the error that fn throws, after its code.
template <class Fn>
std::string error_of(Fn fn) {
  try {
    fn();
  } catch (const Error& e) {
    return std::string(errc_name(e.code())) + " " + e.what();
  }
  return "none";
}

TEST_F(AttentionEdges, Errors) {
  const auto shape_error = [](std::int64_t AttentionShape::*size, std::int64_t value,
                              bool causal = false) {
    AttentionShape shape = kShape;
    shape.causal = causal;
    shape.queries = 2;
    shape.*size = value;
    const std::string of_refusal = error_of([&] { attention_refusal(shape, DType::kF32, false); });
    const std::string text = error_of(
        [&] { attention(shape, DType::kF32, {}, {}, {}, {}, nullptr, serial_executor()); });
    EXPECT_EQ(of_refusal, text);
    return text;
  };
  using S = AttentionShape;
  EXPECT_EQ(shape_error(&S::batch, -1), "Shape attention: batch is -1, expected >= 0");
  EXPECT_EQ(shape_error(&S::heads, 0), "Shape attention: heads is 0, expected >= 1");
  EXPECT_EQ(shape_error(&S::kv_heads, 0), "Shape attention: kv_heads is 0, expected >= 1");
  EXPECT_EQ(shape_error(&S::queries, -2), "Shape attention: queries is -2, expected >= 0");
  EXPECT_EQ(shape_error(&S::keys, 0), "Shape attention: keys is 0, expected >= 1");
  EXPECT_EQ(shape_error(&S::keys, 1, true), "Shape attention: keys is 1, expected >= 2");
  EXPECT_EQ(shape_error(&S::dim, 0), "Shape attention: dim is 0, expected >= 1");
  EXPECT_EQ(shape_error(&S::kv_heads, 3),
            "Shape attention: heads is 2, expected a multiple of kv_heads 3");
  const auto text = [](const AttentionShape& shape, DType dtype) {
    return error_of([&] { attention(shape, dtype, {}, {}, {}, {}, nullptr, serial_executor()); });
  };
  AttentionShape shape = kShape;
  EXPECT_EQ(text(shape, DType::kI8),
            "Unsupported attention: dtype is i8, expected f32, f16 or bf16");
  shape.dim = 24;
  EXPECT_EQ(text(shape, DType::kF32),
            "Unsupported attention: dim is 24, expected a multiple of 16 up to 256");
  shape = kShape;
  EXPECT_EQ(error_of([&] { attention_backward(shape, DType::kF32, {}, {}, serial_executor()); }),
            "Unsupported attention: dtype is f32, expected bf16");
}

}  // namespace
}  // namespace quantal::testing

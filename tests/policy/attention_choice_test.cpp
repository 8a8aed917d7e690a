#include "quantal/attention_choice.h"

#include <gtest/gtest.h>

#include <vector>

namespace quantal {
namespace {

using Sizes = std::vector<std::int64_t>;

std::string error_of(const Sizes& q, const Sizes& k, const Sizes& v) {
  try {
    attention_shape(q, k, v, false, 1);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kShape);
    return error.what();
  }
  return "";
}

TEST(AttentionChoice, ReadsSizesOfTensors) {
  const AttentionShape s =
      attention_shape(Sizes{2, 8, 3, 64}, Sizes{2, 4, 9, 64}, Sizes{2, 4, 9, 64}, true, 0.5);
  EXPECT_EQ(s.batch, 2);
  EXPECT_EQ(s.heads, 8);
  EXPECT_EQ(s.kv_heads, 4);
  EXPECT_EQ(s.queries, 3);
  EXPECT_EQ(s.keys, 9);
  EXPECT_EQ(s.dim, 64);
  EXPECT_TRUE(s.causal);
  EXPECT_EQ(s.scale, 0.5F);
  EXPECT_EQ(s.run_begin, nullptr);
}

TEST(AttentionChoice, NamesSizesThatDiffer) {
  const Sizes q{2, 8, 3, 64}, k{2, 4, 9, 64};
  EXPECT_EQ(error_of({8, 3, 64}, k, k),
            "attention: q has shape [8, 3, 64], expected [batch, heads, positions, dim]");
  EXPECT_EQ(error_of(q, {9, 64}, k),
            "attention: k has shape [9, 64], expected [batch, heads, positions, dim]");
  EXPECT_EQ(error_of(q, {1, 4, 9, 64}, k),
            "attention: k has shape [1, 4, 9, 64], expected [2, kv_heads, keys, 64] as q");
  EXPECT_EQ(error_of(q, {2, 4, 9, 32}, k),
            "attention: k has shape [2, 4, 9, 32], expected [2, kv_heads, keys, 64] as q");
  EXPECT_EQ(error_of(q, k, {2, 4, 8, 64}),
            "attention: v has shape [2, 4, 8, 64], expected [2, 4, 9, 64] as k");
}

TEST(AttentionChoice, AModelGainsWhereItsWorkIsTaken) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    for (const std::int64_t dim : {64, 60}) {
      AttentionShape shape{.batch = 1,
                           .heads = 8,
                           .kv_heads = 4,
                           .queries = 512,
                           .keys = 512,
                           .dim = dim,
                           .causal = true,
                           .scale = 1};
      const auto gain = [&](AttentionUse use) {
        return attention_gain_refusal(8, 4, dim, dtype, use);
      };
      EXPECT_EQ(gain(AttentionUse::kTraining), attention_refusal(shape, dtype, true));
      const bool reads = attention_refusal(shape, dtype, false).empty();
      shape.queries = 1;
      const bool writes = attention_refusal(shape, dtype, false).empty();
      EXPECT_EQ(gain(AttentionUse::kInference).empty(), reads || writes) << dtype_name(dtype);
    }
  }
}

}  // namespace
}  // namespace quantal

// LLM.int8 products of bitsandbytes 0.50.2 (tests/golden). Needs files, so the cross build leaves
// it out.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/support.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

/// The packed form of upstream's CB and SCB.
PackedMatrix packed_int8(const TensorView& cb, const TensorView& scb) {
  const PackedSpec spec{.rows = cb.shape.at(0),
                        .cols = cb.shape.at(1),
                        .bits = 8,
                        .centre = 128,
                        .offset = Offset::kOver127,
                        .group_size = cb.shape.at(1)};
  PackedMatrix w = make_packed(spec);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    for (std::int64_t c = 0; c < spec.cols; ++c) {
      row[static_cast<std::size_t>(c)] =
          static_cast<std::uint8_t>(cb.bytes[static_cast<std::size_t>(r * spec.cols + c)] + 128);
    }
    pack_row(8, row.data(), spec.cols, w.codes.data() + r * layout_of(spec).code_bytes);
  }
  std::copy(scb.bytes.begin(), scb.bytes.end(), w.stats.begin());
  return w;
}

TEST(Int8Golden, ProductsAndDequantizedWeights) {
  const GoldenBook book("bitsandbytes_8bit");
  const std::string_view initial = active_cpu_kernels();
  int products = 0, weights = 0;
  for (const auto& one : book.cases()) {
    const std::string kind = one.at("kind");
    if (kind == "LLM.int8 weight") {
      ++weights;
      const PackedMatrix w = packed_int8(book.field(one, "CB"), book.field(one, "SCB"));
      const TensorView& expected = book.field(one, "dequantized");
      for (std::string_view name : available_cpu_kernels()) {
        select_cpu_kernels(name);
        std::vector<std::uint8_t> out(expected.bytes.size());
        dequantize(w.view(), {0, w.spec.rows, 0, w.spec.cols}, DType::kF32, out.data(), w.spec.cols,
                   serial_executor());
        EXPECT_TRUE(std::equal(out.begin(), out.end(), expected.bytes.begin())) << name;
      }
    }
    if (kind != "LLM.int8 matmul") continue;
    ++products;
    const PackedMatrix w = packed_int8(book.field(one, "CB"), book.field(one, "SCB"));
    const TensorView& x = book.field(one, "activations");
    const TensorView& expected = book.field(one, "output");
    const float threshold = one.at("threshold");
    const std::int64_t m_rows = x.shape.at(0);
    const std::int64_t n = expected.numel();
    for (std::string_view name : available_cpu_kernels()) {
      select_cpu_kernels(name);
      std::vector<std::uint8_t> y(expected.bytes.size());
      matmul_int8(w.view(), DType::kF16, x.bytes.data(), m_rows, nullptr, threshold, y.data(),
                  serial_executor());
      if (threshold == 0) {
        EXPECT_TRUE(std::equal(y.begin(), y.end(), expected.bytes.begin())) << name;
        continue;
      }
      std::vector<float> got(static_cast<std::size_t>(n)), want(got.size());
      widen_to_f32(DType::kF16, y.data(), n, got.data());
      widen_to_f32(DType::kF16, expected.bytes.data(), n, want.data());
      for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 2e-3F) << name;
    }
  }
  select_cpu_kernels(initial);
  EXPECT_EQ(products, 2);
  EXPECT_EQ(weights, 3);
}

}  // namespace
}  // namespace quantal::testing

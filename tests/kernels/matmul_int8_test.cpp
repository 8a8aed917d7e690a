// LLM.int8: every kernel set against integers computed one at a time.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ref/ref.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

class Int8 : public KernelSetTest {};

PackedSpec int8_spec(std::int64_t rows, std::int64_t cols) {
  return {.rows = rows,
          .cols = cols,
          .bits = 8,
          .centre = 128,
          .offset = Offset::kOver127,
          .group_size = cols};
}

/// The rules of quantal/kernels.h in their order; integers in int64, outliers in double.
std::vector<float> expected_product(const PackedMatrix& w, DType dtype, std::vector<float> x,
                                    std::int64_t m_rows, const float* bias, float threshold) {
  const std::int64_t rows = w.spec.rows, cols = w.spec.cols;
  const auto at = [cols](std::int64_t m, std::int64_t k) {
    return static_cast<std::size_t>(m * cols + k);
  };
  std::vector<float> half(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) half[i] = f16_to_f32(f32_to_f16(x[i]));
  std::vector<bool> outlier(static_cast<std::size_t>(cols), false);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (threshold > 0 && std::fabs(half[i]) >= threshold) {
      outlier[i % static_cast<std::size_t>(cols)] = true;
    }
  }
  std::vector<float> y(static_cast<std::size_t>(m_rows * rows));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(cols));
  for (std::int64_t m = 0; m < m_rows; ++m) {
    float sca = 0;
    for (std::int64_t k = 0; k < cols; ++k) {
      const float a = std::fabs(half[at(m, k)]);
      if (std::isnan(a) || threshold == 0 || a < threshold)
        sca = a > sca || std::isnan(a) ? a : sca;
    }
    const float factor = (1.0F / sca) * 127.0F;
    for (std::int64_t n = 0; n < rows; ++n) {
      unpack_row(8, w.codes.data() + n * layout_of(w.spec).code_bytes, cols, codes.data());
      std::int64_t sum = 0;
      double extra = 0;
      for (std::int64_t k = 0; k < cols; ++k) {
        if (outlier[static_cast<std::size_t>(k)]) {
          const float exact = ref::value(w.view(), n, k);
          std::uint8_t bytes[4];
          float v = 0;
          narrow_from_f32(dtype, &exact, 1, bytes);
          widen_to_f32(dtype, bytes, 1, &v);
          extra += static_cast<double>(x[at(m, k)]) * static_cast<double>(v);
          continue;
        }
        const float q = std::nearbyint(half[at(m, k)] * factor);
        sum += (std::isnan(q) ? 0 : static_cast<std::int64_t>(q)) *
               (static_cast<std::int64_t>(codes[static_cast<std::size_t>(k)]) - w.spec.centre);
      }
      float scb = 0;
      std::memcpy(&scb, w.stats.data() + n * 4, 4);
      float out = static_cast<float>(sum) * (sca * scb) * 6.200124e-05F;
      if (bias != nullptr) out += bias[n];
      y[static_cast<std::size_t>(m * rows + n)] = out + static_cast<float>(extra);
    }
  }
  return y;
}

std::vector<std::uint8_t> run(const PackedMatrix& w, DType dtype,
                              const std::vector<std::uint8_t>& x, std::int64_t m_rows,
                              const float* bias, float threshold, const Executor& executor) {
  std::vector<std::uint8_t> y(static_cast<std::size_t>(m_rows * w.spec.rows) * dtype_size(dtype));
  matmul_int8(w.view(), dtype, x.data(), m_rows, bias, threshold, y.data(), executor);
  return y;
}

TEST_F(Int8, EveryKernelSetHasTheExactIntegers) {
  std::uint64_t seed = 1;
  for (std::int64_t cols : {1, 15, 16, 17, 48, 63, 64, 65, 200, 1024, 70000}) {
    for (std::int64_t rows : {1, 3, 4, 9}) {
      if (cols > 2000 && rows > 1) continue;
      for (std::int64_t m : {1, 3, 4, 6}) {
        for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
          const PackedMatrix w = random_packed(int8_spec(rows, cols), ++seed);
          std::vector<float> x = random_floats(m * cols, seed);
          x[0] = 9.0F;
          x.back() = -7.5F;
          std::vector<std::uint8_t> in(x.size() * dtype_size(dtype));
          narrow_from_f32(dtype, x.data(), m * cols, in.data());
          widen_to_f32(dtype, in.data(), m * cols, x.data());
          const std::vector<float> bias = random_floats(rows, seed);
          for (float threshold : {0.0F, 6.0F}) {
            const auto expected = expected_product(w, dtype, x, m, bias.data(), threshold);
            std::vector<std::uint8_t> first;
            for (std::string_view name : available_cpu_kernels()) {
              select_cpu_kernels(name);
              const auto y = run(w, dtype, in, m, bias.data(), threshold, serial_executor());
              EXPECT_EQ(run(w, dtype, in, m, bias.data(), threshold, OddExecutor()), y) << name;
              EXPECT_EQ(run(w, dtype, in, m, bias.data(), threshold, ThreadExecutor()), y) << name;
              if (first.empty()) first = y;
              EXPECT_EQ(y, first) << name << " cols " << cols << " seed " << seed;
            }
            const auto n = static_cast<std::int64_t>(expected.size());
            std::vector<float> got(expected.size()), rounded(expected.size());
            std::vector<std::uint8_t> narrow(first.size());
            widen_to_f32(dtype, first.data(), n, got.data());
            narrow_from_f32(dtype, expected.data(), n, narrow.data());
            widen_to_f32(dtype, narrow.data(), n, rounded.data());
            for (std::size_t i = 0; i < got.size(); ++i) {
              if (threshold == 0) {
                ASSERT_EQ(got[i], rounded[i]) << "output " << i << " cols " << cols;
              } else {  // two roundings to dtype, sums of a few outliers in float32
                const float unit = dtype == DType::kF32   ? 0x1p-20F
                                   : dtype == DType::kF16 ? 0x1p-10F
                                                          : 0x1p-7F;
                ASSERT_NEAR(got[i], expected[i], unit * (1.0F + std::fabs(expected[i])))
                    << "output " << i << " cols " << cols;
              }
            }
          }
        }
      }
    }
  }
}

TEST_F(Int8, ZeroRowsAndNonFiniteActivations) {
  const PackedMatrix w = random_packed(int8_spec(5, 40), 3);
  std::vector<float> x(4 * 40, 0.0F);
  x[40] = NAN;
  x[41] = 1.0F;
  x[80] = INFINITY;
  x[120] = 2.0F;
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    std::vector<float> y(20);
    matmul_int8(w.view(), DType::kF32, x.data(), 4, nullptr, 0.0F, y.data(), serial_executor());
    for (std::size_t n = 0; n < 5; ++n) {
      EXPECT_EQ(y[n], 0.0F) << name;
      EXPECT_TRUE(std::isnan(y[5 + n])) << name;   // a NaN
      EXPECT_TRUE(std::isnan(y[10 + n])) << name;  // an infinity is no outlier without a threshold
      EXPECT_TRUE(std::isfinite(y[15 + n])) << name;
    }
    x[80] = 100.0F;  // an outlier goes through exact weights, for every row
    matmul_int8(w.view(), DType::kF32, x.data(), 4, nullptr, 6.0F, y.data(), serial_executor());
    for (std::int64_t n = 0; n < 5; ++n) {
      EXPECT_EQ(y[static_cast<std::size_t>(10 + n)], 100.0F * ref::value(w.view(), n, 0)) << name;
    }
    x[80] = INFINITY;
  }
}

TEST_F(Int8, RefusesOtherWeights) {
  const float x[64] = {};
  float y[64];
  const auto refused = [&](const PackedSpec& spec, DType dtype, std::int64_t m, float threshold) {
    const PackedMatrix w = make_packed(spec);
    try {
      matmul_int8(w.view(), dtype, x, m, nullptr, threshold, y, serial_executor());
    } catch (const Error& e) {
      return std::string(e.what()).find("expected") != std::string::npos;
    }
    return false;
  };
  const PackedSpec good = int8_spec(4, 16);
  EXPECT_FALSE(refused(good, DType::kF32, 4, 0.0F));
  PackedSpec bad = good;
  bad.offset = Offset::kNone;
  EXPECT_TRUE(refused(bad, DType::kF32, 4, 0.0F));
  bad = good;
  bad.bits = 4;
  EXPECT_TRUE(refused(bad, DType::kF32, 4, 0.0F));
  bad = good;
  bad.group_size = 8;
  EXPECT_TRUE(refused(bad, DType::kF32, 4, 0.0F));
  EXPECT_TRUE(refused(good, DType::kU8, 4, 0.0F));
  EXPECT_TRUE(refused(good, DType::kF32, -1, 0.0F));
  EXPECT_TRUE(refused(good, DType::kF32, 4, -1.0F));
  EXPECT_TRUE(refused(good, DType::kF32, 4, NAN));
}

}  // namespace
}  // namespace quantal::testing

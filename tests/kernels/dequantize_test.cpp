// Every kernel set against the scalar reference, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "kernels/ref/ref.h"
#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

class KernelSets : public KernelSetTest {};

/// Equal bytes, except that any NaN equals any NaN (its payload is not part of the contract).
::testing::AssertionResult same_values(DType dtype, const std::vector<std::uint8_t>& a,
                                       const std::vector<std::uint8_t>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " != " << b.size();
  const std::size_t size = dtype_size(dtype);
  std::vector<float> fa(a.size() / size), fb(b.size() / size);
  widen_to_f32(dtype, a.data(), static_cast<std::int64_t>(fa.size()), fa.data());
  widen_to_f32(dtype, b.data(), static_cast<std::int64_t>(fb.size()), fb.data());
  for (std::size_t i = 0; i < fa.size(); ++i) {
    const bool nan = std::isnan(fa[i]) && std::isnan(fb[i]);
    if (!nan && std::bit_cast<std::uint32_t>(fa[i]) != std::bit_cast<std::uint32_t>(fb[i])) {
      return ::testing::AssertionFailure() << "element " << i << ": " << fa[i] << " != " << fb[i];
    }
  }
  return ::testing::AssertionSuccess();
}

std::vector<std::uint8_t> reference(const PackedMatrix& w, const Panel& p, DType out) {
  const std::int64_t ld = p.col_end - p.col_begin;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>((p.row_end - p.row_begin) * ld) *
                                  dtype_size(out));
  ref::dequantize(w.view(), p, out, bytes.data(), ld);
  return bytes;
}

std::vector<std::uint8_t> kernel(const PackedMatrix& w, const Panel& p, DType out,
                                 const Executor& executor) {
  const std::int64_t ld = p.col_end - p.col_begin;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>((p.row_end - p.row_begin) * ld) *
                                  dtype_size(out));
  dequantize(w.view(), p, out, bytes.data(), ld, executor);
  return bytes;
}

TEST_F(KernelSets, DequantizeEqualsReferenceBitForBit) {
  std::uint64_t seed = 1;
  for (const PackedSpec& spec : kernel_specs()) {
    ++seed;
    const PackedMatrix w = random_packed(spec, seed, seed % 2 == 0);
    for (DType out : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Panel all{0, spec.rows, 0, spec.cols};
      const auto expected = reference(w, all, out);
      for (std::string_view name : available_cpu_kernels()) {
        select_cpu_kernels(name);
        EXPECT_TRUE(same_values(out, kernel(w, all, out, OddExecutor()), expected))
            << name << " " << dtype_name(out) << " " << describe(spec) << " seed " << seed;
      }
    }
  }
}

TEST_F(KernelSets, DequantizePanelIsAPartOfTheWhole) {
  std::uint64_t seed = 100;
  for (const PackedSpec& spec : kernel_specs()) {
    ++seed;
    if (spec.rows < 2) continue;
    const PackedMatrix w = random_packed(spec, seed);
    Random random(seed);
    const std::int64_t begin = random.below((spec.cols - 1) / 128 + 1) * 128;
    const Panel panel{1, spec.rows, begin, begin + 1 + random.below(spec.cols - begin)};
    const auto expected = reference(w, panel, DType::kBF16);
    for (std::string_view name : available_cpu_kernels()) {
      select_cpu_kernels(name);
      EXPECT_TRUE(
          same_values(DType::kBF16, kernel(w, panel, DType::kBF16, ThreadExecutor()), expected))
          << name << " " << describe(spec) << " columns " << panel.col_begin << ".."
          << panel.col_end;
    }
  }
}

TEST_F(KernelSets, SubnormalValuesOfTinyTablesAndStatistics) {
  for (const float scale : {1.0F, 1e-9F, 1e-38F}) {
    for (const float level : {0.5F, 1e-10F, 1e-39F}) {
      for (const Offset offset : {Offset::kNone, Offset::kBias, Offset::kZeroPoint}) {
        const PackedSpec spec{
            .rows = 2, .cols = 192, .code_map = CodeMap::kTable, .offset = offset};
        PackedMatrix w = random_packed(spec, 7);
        for (std::size_t i = 0; i < 16; ++i) {
          const float v = level * (static_cast<float>(i) - 7.0F);
          std::memcpy(w.shared.data() + i * 4, &v, 4);
        }
        const std::vector<float> scales(6, scale), offsets(6, scale * 0.75F);
        spread_stats(spec,
                     {.scales = reinterpret_cast<const std::uint8_t*>(scales.data()),
                      .offsets = reinterpret_cast<const std::uint8_t*>(offsets.data())},
                     0, w.stats.data(), serial_executor());
        const auto expected = reference(w, {0, 2, 0, 192}, DType::kBF16);
        for (std::string_view name : available_cpu_kernels()) {
          select_cpu_kernels(name);
          EXPECT_TRUE(same_values(
              DType::kBF16, kernel(w, {0, 2, 0, 192}, DType::kBF16, serial_executor()), expected))
              << name << " " << scale << " " << level << " " << describe(spec);
        }
      }
    }
  }
}

TEST_F(KernelSets, EveryScaleOfOneByte) {
  for (const ScaleSource scale : {ScaleSource::kE8M0, ScaleSource::kE4M3}) {
    for (const DType value : {DType::kF32, DType::kBF16, DType::kF16}) {
      const PackedSpec spec{.rows = 256,
                            .cols = 128,
                            .code_map = CodeMap::kE2M1,
                            .scale = scale,
                            .value_dtype = value,
                            .group_size = 32};
      PackedMatrix w = random_packed(spec, 11);
      std::vector<std::uint8_t> bytes;
      for (std::int64_t g = 0; g < 4 * spec.rows; ++g) {
        bytes.push_back(static_cast<std::uint8_t>(g / 4));
      }
      spread_stats(spec, {.scales = bytes.data()}, 0, w.stats.data(), serial_executor());
      const auto expected = reference(w, {0, 256, 0, 128}, DType::kBF16);
      for (std::string_view name : available_cpu_kernels()) {
        select_cpu_kernels(name);
        EXPECT_TRUE(same_values(
            DType::kBF16, kernel(w, {0, 256, 0, 128}, DType::kBF16, serial_executor()), expected))
            << name << " " << describe(spec);
      }
    }
  }
}

TEST_F(KernelSets, DequantizeLeavesWhatIsBetweenRowsAlone) {
  const PackedSpec spec{.rows = 3, .cols = 37, .offset = Offset::kBias, .group_size = 5};
  const PackedMatrix w = random_packed(spec, 5);
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    std::vector<std::uint16_t> out(3 * 40, 0xABCD);
    dequantize(w.view(), {0, 3, 0, 37}, DType::kF16, out.data(), 40, serial_executor());
    for (std::size_t r = 0; r < 3; ++r) {
      for (std::size_t c = 37; c < 40; ++c) EXPECT_EQ(out[r * 40 + c], 0xABCD) << name;
    }
  }
}

TEST_F(KernelSets, PhasesBeyondTheRowAreReadInsideTheBuffers) {
  PackedSpec spec{.rows = 3,
                  .cols = 100,
                  .code_map = CodeMap::kNf4,
                  .scale = ScaleSource::kNestedU8,
                  .group_size = 64,
                  .nested_group_size = 2};
  PackedMatrix w = random_packed(spec, 6);
  const PackedLayout layout = layout_of(spec);
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    std::memset(w.stats.data() + r * layout.stat_bytes, 0xFF, 4);
  }
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    const auto out = kernel(w, {0, 3, 0, 100}, DType::kF32, serial_executor());  // asan watches
    EXPECT_EQ(out.size(), 1200U);
  }
  EXPECT_THROW(gather_stats(w.view()), Error);
}

/// Relative error of the rows that a sample of a large matrix consists of, by its formula.
double error_of_rows(const PackedMatrix& w, const std::vector<float>& dense,
                     const std::vector<std::int64_t>& rows) {
  const std::int64_t cols = w.spec.cols;
  double error = 0, total = 0;
  for (const std::int64_t row : rows) {
    std::vector<float> values(static_cast<std::size_t>(cols));
    ref::dequantize(w.view(), {row, row + 1, 0, cols}, DType::kF32, values.data(), cols);
    for (std::int64_t c = 0; c < cols; ++c) {
      const double value = dense[static_cast<std::size_t>(row * cols + c)];
      error += std::pow(value - static_cast<double>(values[static_cast<std::size_t>(c)]), 2);
      total += value * value;
    }
  }
  return std::sqrt(error / total);
}

TEST(SampledError, IsThatOfEvenlySpacedRowsForEveryForm) {
  std::uint64_t seed = 40;
  for (const PackedSpec& spec : kernel_specs()) {
    if (spec.rows == 0 || spec.cols == 0) continue;
    const PackedMatrix w = random_packed(spec, ++seed, true);
    std::vector<float> dense(static_cast<std::size_t>(spec.rows * spec.cols));
    for (std::size_t i = 0; i < dense.size(); ++i) {
      dense[i] = 0.01F * static_cast<float>(i % 71) - 0.3F;
    }
    const std::int64_t count = std::clamp<std::int64_t>(8192 / spec.cols, 1, spec.rows);
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < count; ++i) {
      rows.push_back(count == 1 ? 0 : i * (spec.rows - 1) / (count - 1));
    }
    const double expected = error_of_rows(w, dense, rows);
    if (!std::isfinite(expected)) continue;
    EXPECT_NEAR(sampled_error(w.view(), DType::kF32, dense.data()), expected, 1e-5 * expected);
  }
}

TEST(SampledError, IsZeroForZerosAndRefusesOtherDtypes) {
  const PackedMatrix w = random_packed(kernel_specs().front(), 3, true);
  const std::vector<double> zeros(static_cast<std::size_t>(w.spec.rows * w.spec.cols));
  EXPECT_EQ(sampled_error(w.view(), DType::kF32, zeros.data()), 0);
  EXPECT_THROW(sampled_error(w.view(), DType::kF64, zeros.data()), Error);
}

TEST(Dequantize, RefusesPanelsOutsideTheMatrixAndOddColumns) {
  const PackedMatrix w = make_packed({.rows = 4, .cols = 64});
  float out[256];
  const auto run = [&](Panel p, std::int64_t ld, DType dtype) {
    dequantize(w.view(), p, dtype, out, ld, serial_executor());
  };
  EXPECT_NO_THROW(run({0, 4, 0, 64}, 64, DType::kF32));
  EXPECT_THROW(run({0, 5, 0, 64}, 64, DType::kF32), Error);
  EXPECT_THROW(run({0, 4, 0, 65}, 65, DType::kF32), Error);
  EXPECT_THROW(run({0, 4, 32, 64}, 64, DType::kF32), Error);
  EXPECT_THROW(run({0, 4, 0, 64}, 63, DType::kF32), Error);
  EXPECT_THROW(run({0, 4, 0, 64}, 64, DType::kU8), Error);
  PackedMatrix cut = w;
  cut.stats.pop_back();
  EXPECT_THROW(dequantize(cut.view(), {0, 1, 0, 1}, DType::kF32, out, 1, serial_executor()), Error);
}

}  // namespace
}  // namespace quantal::testing

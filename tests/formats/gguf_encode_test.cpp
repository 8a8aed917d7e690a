// Encoders of ggml's blocks: the bits of ggml's C reference for the blocks of 32, bounded errors
// for the searched types, and one typed error for what cannot be stored.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "formats/layers.h"
#include "kernels/support.h"
#include "quantal/ggml.h"
#include "quantal/kernels.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

constexpr std::array<GgmlType, 5> kExact = {GgmlType::kQ4_0, GgmlType::kQ4_1, GgmlType::kQ5_0,
                                            GgmlType::kQ5_1, GgmlType::kQ8_0};
constexpr std::array<GgmlType, 4> kSearched = {GgmlType::kQ4_K, GgmlType::kQ5_K, GgmlType::kQ6_K,
                                               GgmlType::kIQ4_NL};

std::vector<std::uint8_t> encode(GgmlType type, const TensorView& w,
                                 const Executor& executor = serial_executor()) {
  const std::int64_t rows = w.shape[0], cols = w.shape[1];
  std::vector<std::uint8_t> out(static_cast<std::size_t>(ggml_bytes(type, rows, cols)));
  encode_ggml(type, w.dtype, w.bytes.data(), rows, cols, out.data(), executor);
  return out;
}

std::vector<float> values(GgmlType type, const std::vector<std::uint8_t>& blocks, std::int64_t n) {
  std::vector<float> out(static_cast<std::size_t>(n));
  decode_ggml(type, blocks.data(), n, out.data());
  return out;
}

/// Weights of every kind that the rules treat apart: both signs of zero, ties, subnormals,
/// outliers.
Tensor mixed_weights(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> w(static_cast<std::size_t>(rows * cols));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const auto kind = static_cast<std::int64_t>(i / 32) % 8;
    float v = (random.uniform(-1, 1) + random.uniform(-1, 1)) * 0.05F;
    if (kind == 1) v = random.below(2) == 0 ? 0.0F : -0.0F;
    if (kind == 2) v = static_cast<float>(random.below(17) - 8) * 0.125F;
    if (kind == 3) v *= 1e-38F;
    if (kind == 4 && random.below(16) == 0) v *= 500;
    if (kind == 5) v = std::fabs(v);
    if (kind == 6 && random.below(3) == 0) v = random.below(2) == 0 ? 0.0F : -0.0F;
    w[i] = v;
  }
  Tensor out = make_tensor(dtype, {rows, cols});
  narrow_from_f32(dtype, w.data(), rows * cols, out.bytes.data());
  return out;
}

TEST(GgufEncode, BlocksOf32HaveTheBitsOfUpstream) {
  const GoldenBook book("gguf_blocks");
  const Tensor mix = golden_input("mix", "f32");
  const std::int64_t cols = mix.shape[1];
  int seen = 0;
  for (const auto& one : book.cases()) {
    if (!one.contains("rows_of_mix")) continue;
    SCOPED_TRACE(one.at("type").get<std::string>());
    const GgmlBlock* block = find_ggml_block(std::string_view(one.at("type").get<std::string>()));
    ASSERT_NE(block, nullptr);
    std::vector<std::uint8_t> rows;
    for (const auto& row : one.at("rows_of_mix")) {
      const auto* at = mix.bytes.data() + row.get<std::int64_t>() * cols * 4;
      rows.insert(rows.end(), at, at + cols * 4);
    }
    const TensorView w{DType::kF32, {std::ssize(rows) / (cols * 4), cols}, rows};
    for (const std::string_view set : available_cpu_kernels()) {
      select_cpu_kernels(set);
      EXPECT_EQ(encode(block->type, w), bytes_of(book.field(one, "raw"))) << set;
    }
    ++seen;
  }
  select_cpu_kernels(available_cpu_kernels().front());
  EXPECT_EQ(seen, 5);
}

TEST(GgufEncode, SameBytesForEverySetDtypeAndSplit) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Tensor w = mixed_weights(37, 768, dtype, 11);
    Tensor wide = make_tensor(DType::kF32, w.shape);
    widen_to_f32(dtype, w.bytes.data(), w.view().numel(),
                 reinterpret_cast<float*>(wide.bytes.data()));
    for (const auto types :
         {std::span<const GgmlType>(kExact), std::span<const GgmlType>(kSearched)}) {
      for (const GgmlType type : types) {
        select_cpu_kernels("scalar");
        const auto expected = encode(type, wide.view());
        for (const std::string_view set : available_cpu_kernels()) {
          SCOPED_TRACE(std::string(ggml_block(type).name) + " " + std::string(set));
          select_cpu_kernels(set);
          EXPECT_EQ(encode(type, w.view()), expected);
          EXPECT_EQ(encode(type, w.view(), OddExecutor()), expected);
        }
      }
    }
  }
  select_cpu_kernels(available_cpu_kernels().front());
}

/// ||w' - w||^2 / ||w||^2 of each row of the golden input "mix" under ggml 0.25.3's own encoders
/// (ggml_quantize_chunk without an importance matrix); -1 for rows of zeros.
struct UpstreamErrors {
  GgmlType type;
  std::array<double, 40> rows;
};
const std::array<UpstreamErrors, 4> kUpstream = {{
    {GgmlType::kQ4_K,
     {0.004604,  0.00537,   0.004806,  0.006164,  0.004581, 0.004555,  0.004739,  0.004676,
      0.009572,  0.01109,   0.009137,  0.01058,   0.01018,  0.01387,   -1,        -1,
      0.004622,  0.004467,  5.361e-07, 2.073e-08, 0.001467, 6.018e-07, 1,         4.882e-07,
      5.084e-07, 2.028e-06, 0.0003965, -1,        -1,       -1,        0.007713,  0.0002714,
      0.0002684, 0.0001037, 0.0001024, 0.0002059, 0.001171, 0.001294,  0.0008718, 0.0006329}},
    {GgmlType::kQ5_K,
     {0.001154,  0.001348,  0.001243,  0.001421,  0.001151,  0.00129,   0.001279,  0.00122,
      0.002637,  0.002913,  0.002304,  0.002462,  0.002483,  0.00451,   -1,        -1,
      0.001191,  0.00109,   1.227e-06, 2.073e-08, 0.0004322, 3.527e-07, 1,         2.08e-07,
      6.149e-07, 2.028e-06, 0.0003812, -1,        -1,        -1,        5.285,     7.056e-05,
      6.986e-05, 8.535e-05, 3.558e-05, 4.294e-05, 0.0002945, 0.0003364, 0.0002174, 0.0001543}},
    {GgmlType::kQ6_K,
     {0.0002853, 0.0003093, 0.0003208, 0.0003765, 0.0002678, 0.0003623, 0.0002796, 0.0002326,
      0.0009833, 0.001179,  0.0006972, 0.000863,  0.001425,  0.000597,  -1,        -1,
      0.0003239, 0.0002822, 1.515e-06, 1.515e-06, 9.458e-05, 1.158e-07, 1,         9.313e-10,
      1.566e-07, 1.675e-07, 0.0002743, -1,        -1,        -1,        1,         9.103e-05,
      8.889e-05, 3.725e-05, 2.549e-05, 5.429e-05, 0.0002244, 0.0002299, 0.0002632, 0.0001756}},
    {GgmlType::kIQ4_NL,
     {0.005573, 0.006652, 0.00558,   0.007001, 0.005453, 0.006767,  0.005242, 0.004858,
      0.01319,  0.01443,  0.01374,   0.01321,  0.01367,  0.01031,   -1,       -1,
      0.006122, 0.005522, 4.91e-08,  4.91e-08, 0.001619, 3.951e-07, 1,        0.003391,
      0.00192,  0.001923, 0.00246,   -1,       -1,       -1,        0.0174,   0.002802,
      0.002794, 0.002555, 0.0007825, 0.002684, 0.004586, 0.004691,  0.004545, 0.004141}},
}};

/// Rows of "mix" of one kind: normal, heavy tailed, with zeros, constant, outliers, tiny, grids, of
/// one sign.
constexpr std::array<std::int64_t, 10> kKinds = {0, 8, 14, 18, 24, 27, 31, 36, 38, 40};

TEST(GgufEncode, SearchedErrorsAreAtMostUpstreamsTimes102) {
  constexpr double kFactor = 1.02, kOneBlock = 1.05;
  const Tensor mix = golden_input("mix", "f32");
  const std::int64_t rows = mix.shape[0], cols = mix.shape[1];
  const float* w = mix.view().data<float>();
  for (const UpstreamErrors& upstream : kUpstream) {
    const auto decoded = values(upstream.type, encode(upstream.type, mix.view()), rows * cols);
    for (std::size_t kind = 0; kind + 1 < kKinds.size(); ++kind) {
      double ours_of_kind = 0, theirs_of_kind = 0;
      for (std::int64_t r = kKinds[kind]; r < kKinds[kind + 1]; ++r) {
        SCOPED_TRACE(std::string(ggml_block(upstream.type).name) + " row " + std::to_string(r));
        double error = 0, norm = 0;
        for (std::int64_t i = r * cols; i < (r + 1) * cols; ++i) {
          const double d = double{decoded[static_cast<std::size_t>(i)]} - double{w[i]};
          error += d * d;
          norm += double{w[i]} * double{w[i]};
        }
        const double theirs = upstream.rows[static_cast<std::size_t>(r)];
        if (theirs < 0) {
          EXPECT_LT(error, 1e-12);
          continue;
        }
        EXPECT_LE(error, kOneBlock * theirs * norm);
        ours_of_kind += error / norm;
        theirs_of_kind += theirs;
      }
      EXPECT_LE(ours_of_kind, kFactor * theirs_of_kind) << "rows from " << kKinds[kind];
    }
  }
}

TEST(GgufEncode, ScalesBelowBinary16BecomeZero) {
  // Documented: 1 / d is infinite, codes are those of a zero block.
  std::vector<float> w(32, 1e-39F);
  w[3] = -2e-39F;
  const TensorView view{
      DType::kF32, {1, 32}, {reinterpret_cast<const std::uint8_t*>(w.data()), 128}};
  const auto q4 = encode(GgmlType::kQ4_0, view);
  EXPECT_EQ(q4[0] | (q4[1] & 0x7F), 0);
  for (std::size_t i = 2; i < q4.size(); ++i) EXPECT_EQ(q4[i], 0x88);
  const auto q8 = encode(GgmlType::kQ8_0, view);
  for (const std::uint8_t byte : q8) EXPECT_EQ(byte, 0);
  for (const GgmlType type : kExact) {
    for (const float v : values(type, encode(type, view), 32)) EXPECT_EQ(v, 0.0F);
  }
}

TEST(GgufEncode, PlainFloatsConvertAndKeepSpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::array<float, 4> w = {1.5F, -inf, 65519.0F, -0.0F};
  const TensorView view{DType::kF32, {2, 2}, {reinterpret_cast<const std::uint8_t*>(w.data()), 16}};
  const auto half = encode(GgmlType::kF16, view);
  const std::array<std::uint16_t, 4> expected = {0x3E00, 0xFC00, 0x7BFF, 0x8000};
  EXPECT_EQ(std::memcmp(half.data(), expected.data(), half.size()), 0);
  EXPECT_EQ(encode(GgmlType::kF32, view), bytes_of(view));
  const auto brain = encode(GgmlType::kBF16, view);
  EXPECT_EQ(brain[0] | brain[1] << 8, 0x3FC0);
}

TEST(GgufEncode, RefusesByName) {
  const auto run = [](GgmlType type, std::vector<float> w, std::int64_t cols) {
    const auto rows = std::ssize(w) / cols;
    std::vector<std::uint8_t> out(w.size() * 4 + 64);
    encode_ggml(type, DType::kF32, w.data(), rows, cols, out.data(), OddExecutor());
  };
  std::vector<float> w(3 * 256, 0.5F);
  for (const GgmlType type : {GgmlType::kQ4_0, GgmlType::kQ5_1, GgmlType::kQ8_0, GgmlType::kQ4_K,
                              GgmlType::kQ6_K, GgmlType::kIQ4_NL}) {
    SCOPED_TRACE(ggml_block(type).name);
    auto bad = w;
    bad[256 + 77] = std::numeric_limits<float>::quiet_NaN();
    bad[512 + 1] = std::numeric_limits<float>::infinity();
    expect_error(Errc::kUnsupported, {"gguf", "row 1, column 77", "nan"},
                 [&] { run(type, bad, 256); });
    bad = w;
    bad[512 + 5] = 3e38F;
    expect_error(Errc::kUnsupported, {"row 2, column 5", "binary16"}, [&] { run(type, bad, 256); });
  }
  auto large = w;
  large[300] = 70000.0F;
  expect_error(Errc::kUnsupported, {"row 1, column 44", "70000", "F16"},
               [&] { run(GgmlType::kF16, large, 256); });
  expect_error(Errc::kUnsupported, {"Q2_K", "expected one of"},
               [&] { run(GgmlType::kQ2_K, w, 256); });
  expect_error(Errc::kUnsupported, {"I8"}, [&] { run(GgmlType::kI8, w, 256); });
  expect_error(Errc::kShape, {"[6, 128]", "multiple of 256", "Q4_K"},
               [&] { run(GgmlType::kQ4_K, w, 128); });
  expect_error(Errc::kShape, {"multiple of 32"}, [&] { run(GgmlType::kQ4_0, w, 48); });
  std::vector<std::uint8_t> out(64);
  expect_error(Errc::kDtype, {"u8", "f32, f16, bf16"}, [&] {
    encode_ggml(GgmlType::kQ4_0, DType::kU8, w.data(), 1, 32, out.data(), serial_executor());
  });
}

TEST(GgufEncode, TypeForShortRowsIsThatOfLlamaCpp) {
  EXPECT_EQ(ggml_type_for(GgmlType::kQ4_K, 512), GgmlType::kQ4_K);
  EXPECT_EQ(ggml_type_for(GgmlType::kQ4_K, 576), GgmlType::kQ5_0);
  EXPECT_EQ(ggml_type_for(GgmlType::kQ5_K, 576), GgmlType::kQ5_1);
  EXPECT_EQ(ggml_type_for(GgmlType::kQ6_K, 576), GgmlType::kQ8_0);
  EXPECT_EQ(ggml_type_for(GgmlType::kQ3_K, 576), GgmlType::kIQ4_NL);
  EXPECT_EQ(ggml_type_for(GgmlType::kQ4_0, 40), GgmlType::kF16);
}

}  // namespace
}  // namespace quantal::testing

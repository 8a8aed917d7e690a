// The block quantizer primitives of every instruction set against the scalar truth, byte for byte.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "core/half.h"
#include "kernels/block_quantize.h"
#include "kernels/support.h"
#include "quantal/kernels.h"

namespace quantal::testing {
namespace {

std::vector<const BlockQuantizeKernels*> vector_sets() {
  std::vector<const BlockQuantizeKernels*> out;
  for (const std::string_view name : available_cpu_kernels()) {
    if (name == "scalar") continue;
    select_cpu_kernels(name);
    // Sets that differ in products only share the primitives: avx512bf16 has those of avx512.
    EXPECT_TRUE(name.starts_with(block_quantize_kernels().name)) << name;
    if (!out.empty() && out.back() == &block_quantize_kernels()) continue;
    out.push_back(&block_quantize_kernels());
  }
  select_cpu_kernels(available_cpu_kernels().front());
  return out;
}

std::vector<float> random_weights(std::size_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> w(n);
  for (std::size_t i = 0; i < n; ++i) {
    w[i] = (random.uniform(-1, 1) + random.uniform(-1, 1)) * 0.1F;
    if (random.below(60) == 0) w[i] = random.below(2) == 0 ? 0.0F : -0.0F;
    if (random.below(90) == 0) w[i] *= 1000;
    if ((i / 32) % 11 == 3) w[i] = static_cast<float>(random.below(9) - 4);  // ties of both signs
    if ((i / 32) % 11 == 4) w[i] = random.below(2) == 0 ? 0.0F : -0.0F;
    if ((i / 32) % 11 == 5) w[i] *= 1e-37F;
    if ((i / 32) % 11 == 6) w[i] = std::fabs(w[i]) * (random.below(4) == 0 ? 0.0F : 1.0F);
  }
  return w;
}

struct Narrowed {
  DType dtype;
  std::vector<std::uint8_t> bytes;
  WeightRun run() const { return {dtype, bytes.data()}; }
};

Narrowed narrowed(const std::vector<float>& w, DType dtype, std::size_t shift) {
  Narrowed out{dtype, std::vector<std::uint8_t>((w.size() - shift) * dtype_size(dtype))};
  narrow_from_f32(dtype, w.data() + shift, std::ssize(w) - static_cast<std::ptrdiff_t>(shift),
                  out.bytes.data());
  return out;
}

/// All results of the group primitives as one row of bytes; bits, so that -0 counts.
std::vector<std::uint8_t> run_groups(const BlockQuantizeKernels& k, WeightRun w,
                                     std::int64_t groups) {
  const auto n = static_cast<std::size_t>(groups);
  std::vector<float> scales(n), lows(n);
  std::vector<std::uint8_t> codes(n * 40, 0xEE), out;
  const auto record = [&](bool finite) {
    out.push_back(finite ? 1 : 0);
    const auto add = [&out](const void* p, std::size_t bytes) {
      const auto* b = static_cast<const std::uint8_t*>(p);
      out.insert(out.end(), b, b + bytes);
    };
    add(scales.data(), 4 * n);
    add(lows.data(), 4 * n);
    add(codes.data(), codes.size());
  };
  record(k.extreme32(w, groups, 8, scales.data(), codes.data()));
  record(k.extreme32(w, groups, 16, scales.data(), codes.data()));
  record(k.range32(w, groups, 15, scales.data(), lows.data(), codes.data()));
  record(k.range32(w, groups, 31, scales.data(), lows.data(), codes.data()));
  record(k.absmax32(w, groups, scales.data(), codes.data(), 32));
  record(k.absmax32(w, groups, scales.data(), codes.data(), 34));
  return out;
}

TEST(BlockPrimitives, GroupsOf32EqualTheScalarSet) {
  const std::vector<float> w = random_weights(32 * 70 + 3, 5);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const std::size_t shift : {std::size_t{0}, std::size_t{3}}) {
      const Narrowed run = narrowed(w, dtype, shift);
      for (const std::int64_t groups : {1, 2, 7, 8, 9, 15, 16, 17, 33, 70}) {
        const auto expected = run_groups(block_quantize_kernels_scalar(), run.run(), groups);
        for (const BlockQuantizeKernels* set : vector_sets()) {
          EXPECT_EQ(run_groups(*set, run.run(), groups), expected)
              << set->name << " groups " << groups << " shift " << shift;
        }
      }
    }
  }
}

TEST(BlockPrimitives, FindWhatIsNotFinite) {
  std::vector<float> w(32 * 20, 0.25F);
  std::vector<float> scales(20), lows(20);
  std::vector<std::uint8_t> codes(32 * 20);
  auto sets = vector_sets();
  sets.push_back(&block_quantize_kernels_scalar());
  for (const float bad : {std::nanf(""), -INFINITY}) {
    for (const std::size_t at : {std::size_t{0}, std::size_t{31}, std::size_t{300}, w.size() - 1}) {
      w[at] = bad;
      for (const BlockQuantizeKernels* k : sets) {
        const WeightRun run{DType::kF32, w.data()};
        EXPECT_FALSE(k->extreme32(run, 20, 8, scales.data(), codes.data())) << k->name;
        EXPECT_FALSE(k->range32(run, 20, 15, scales.data(), lows.data(), codes.data()));
        EXPECT_FALSE(k->absmax32(run, 20, scales.data(), codes.data(), 32));
      }
      w[at] = 0.25F;
    }
  }
}

TEST(BlockPrimitives, RoundingOfAbsmaxIsHalfAwayFromZero) {
  std::vector<float> w(32);
  for (std::size_t i = 0; i < 32; ++i) w[i] = static_cast<float>(i) - 15.5F;
  w[0] = 127.0F;  // d = 1
  float scale = 0;
  std::uint8_t codes[32];
  auto sets = vector_sets();
  sets.push_back(&block_quantize_kernels_scalar());
  for (const BlockQuantizeKernels* k : sets) {
    ASSERT_TRUE(k->absmax32({DType::kF32, w.data()}, 1, &scale, codes, 32));
    EXPECT_EQ(scale, 1.0F);
    for (std::size_t i = 1; i < 32; ++i) {
      EXPECT_EQ(static_cast<std::int8_t>(codes[i]), static_cast<int>(std::round(w[i]))) << i;
    }
  }
}

TEST(BlockPrimitives, Binary16OfEveryRange) {
  Random random(3);
  std::vector<float> in;
  for (int i = 0; i < 4000; ++i) {
    in.push_back(
        std::bit_cast<float>(static_cast<std::uint32_t>(random.next() >> 32) & 0xC77FFFFF));
  }
  for (const float edge :
       {0.0F, -0.0F, 65519.0F, -65519.0F, 6.1e-5F, 5.96e-8F, 2.98e-8F, 2.99e-8F}) {
    in.push_back(edge);
  }
  std::vector<std::uint16_t> out(in.size());
  for (const BlockQuantizeKernels* set : vector_sets()) {
    EXPECT_TRUE(set->to_f16(in.data(), std::ssize(in), out.data()));
    for (std::size_t i = 0; i < in.size(); ++i) EXPECT_EQ(out[i], f32_to_f16(in[i])) << in[i];
    for (const std::int64_t n : {1, 5, 40}) {
      std::vector<float> large(static_cast<std::size_t>(n), 1.0F);
      large.back() = 65520.0F;
      EXPECT_FALSE(set->to_f16(large.data(), n, out.data()));
      EXPECT_EQ(out[static_cast<std::size_t>(n - 1)], 0x7C00);
    }
  }
}

TEST(BlockPrimitives, SearchesEqualTheScalarSet) {
  const std::vector<float> w = random_weights(64 * 60, 9);
  const BlockQuantizeKernels& truth = block_quantize_kernels_scalar();
  for (const BlockQuantizeKernels* set : vector_sets()) {
    for (std::size_t at = 0; at + 64 <= w.size(); at += 64) {
      for (const std::int64_t n : {16, 32, 64}) {
        const float* x = w.data() + at;
        const ShiftedFit a = set->fit_shifted(x, n, 15), b = truth.fit_shifted(x, n, 15);
        EXPECT_EQ(std::bit_cast<std::uint32_t>(a.scale), std::bit_cast<std::uint32_t>(b.scale));
        EXPECT_EQ(std::bit_cast<std::uint32_t>(a.shift), std::bit_cast<std::uint32_t>(b.shift));
        EXPECT_GE(a.shift, 0.0F);
        const float s = set->fit_symmetric(x, n, 32), t = truth.fit_symmetric(x, n, 32);
        EXPECT_EQ(std::bit_cast<std::uint32_t>(s), std::bit_cast<std::uint32_t>(t));
        const NearestCode how{.scale = a.scale, .shift = a.shift, .centre = 0, .max_code = 15};
        std::uint8_t left[64], right[64];
        EXPECT_EQ(set->encode_nearest(x, n, how, left), truth.encode_nearest(x, n, how, right));
        EXPECT_EQ(std::memcmp(left, right, static_cast<std::size_t>(n)), 0);
        EXPECT_EQ(set->encode_nearest(x, n, how, nullptr),
                  truth.encode_nearest(x, n, how, nullptr));
      }
    }
  }
}

TEST(BlockPrimitives, FitsRecoverWhatWasEncoded) {
  // Weights that lie on a grid are fitted without error (up to rounding of float32).
  std::vector<float> w(32), v(16);
  for (std::size_t i = 0; i < 32; ++i) w[i] = 0.25F * static_cast<float>(i % 16) - 1.5F;
  for (std::size_t i = 0; i < 16; ++i) v[i] = 0.125F * (static_cast<float>(4 * i) - 32.0F);
  const BlockQuantizeKernels& k = block_quantize_kernels();
  const ShiftedFit fit = k.fit_shifted(w.data(), 32, 15);
  EXPECT_NEAR(fit.scale, 0.25F, 1e-6F);
  EXPECT_NEAR(fit.shift, 1.5F, 1e-5F);
  EXPECT_NEAR(k.fit_symmetric(v.data(), 16, 32), 0.125F, 1e-6F);
}

}  // namespace
}  // namespace quantal::testing

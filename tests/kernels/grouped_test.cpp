// The grouped quantizer primitives: every instruction set against the scalar truth, byte for byte,
// and the truth against its formulas.
#include "kernels/grouped.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/small_float.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

std::vector<const GroupedKernels*> vector_sets() {
  std::vector<const GroupedKernels*> out;
  for (const std::string_view name : available_cpu_kernels()) {
#if defined(__x86_64__)
    if (name == "avx512") out.push_back(&grouped_kernels_avx512());
    if (name == "avx2") out.push_back(&grouped_kernels_avx2());
#elif defined(__aarch64__)
    if (name == "neon") out.push_back(&grouped_kernels_neon());
#endif
  }
  return out;
}

constexpr std::int64_t kRowWeights = 256;
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

/// Rows of many kinds, finite in `dtype`.
Tensor weights_of(DType dtype, std::int64_t rows, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> w(static_cast<std::size_t>(rows * kRowWeights));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / kRowWeights;
    float x = random.uniform(-0.1F, 0.1F);
    switch (row % 10) {
      case 1:
        x = random.below(2) == 0 ? 0.0F : -0.0F;
        break;
      case 2:
        x = 0.0371F;
        break;
      case 3:
        x *= std::ldexp(1.0F, static_cast<int>(random.below(150)) - 140);
        break;
      case 4:
        x = std::fabs(x) + 0.01F;
        break;
      case 5:
        x = -std::fabs(x) - 0.01F;
        break;
      case 6:
        x = static_cast<float>(random.below(13) - 6) * 0.25F;
        break;
      case 7:
        x *= 1e-38F;
        break;
      case 8:
        x *= std::ldexp(1.0F, static_cast<int>(random.below(19)));
        break;
      case 9:
        x = dtype == DType::kF16 ? x * 5e5F : x * 1e3F * 3e36F;
        break;
      default:
        break;
    }
    w[i] = x;
  }
  Tensor out = make_tensor(dtype, {rows, kRowWeights});
  narrow_from_f32(dtype, w.data(), rows * kRowWeights, out.bytes.data());
  return out;
}

struct Anchored {
  bool finite = false;
  std::vector<float> scales, biases;
  std::vector<std::uint8_t> codes;
};

Anchored anchored(const GroupedKernels& set, const Tensor& w, std::int64_t weights,
                  std::int64_t group_size, int bits) {
  const auto groups = static_cast<std::size_t>(weights / group_size);
  Anchored out{false, std::vector<float>(groups), std::vector<float>(groups),
               std::vector<std::uint8_t>(static_cast<std::size_t>(weights))};
  out.finite = set.encode_anchored({{w.dtype, w.bytes.data()},
                                    weights / group_size,
                                    group_size,
                                    bits,
                                    out.scales.data(),
                                    out.biases.data(),
                                    out.codes.data()});
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(GroupedPrimitives, AnchoredCodesAgreeOnEverySet) {
  for (const DType dtype : kTypes) {
    const Tensor w = weights_of(dtype, 40, 11);
    for (const std::int64_t group_size : {32, 64, 128}) {
      for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
        // The whole matrix, and runs of few groups: the vector sets compute 16 groups side by side.
        for (const std::int64_t groups :
             {std::int64_t{1}, std::int64_t{5}, 40 * 256 / group_size}) {
          const std::int64_t n = groups * group_size;
          const Anchored truth = anchored(grouped_kernels_scalar(), w, n, group_size, bits);
          ASSERT_TRUE(truth.finite);
          for (const GroupedKernels* set : vector_sets()) {
            const Anchored own = anchored(*set, w, n, group_size, bits);
            const std::string at = std::string(set->name) + " " + std::string(dtype_name(dtype)) +
                                   " group " + std::to_string(group_size) + " bits " +
                                   std::to_string(bits);
            EXPECT_TRUE(own.finite) << at;
            EXPECT_TRUE(same_bits(own.scales, truth.scales)) << at;
            EXPECT_TRUE(same_bits(own.biases, truth.biases)) << at;
            EXPECT_EQ(own.codes, truth.codes) << at;
          }
        }
      }
    }
  }
}

struct Microscaled {
  bool finite = false;
  std::vector<std::uint8_t> scales, codes;
};

Microscaled microscaled(const GroupedKernels& set, const Tensor& w, std::int64_t group_size,
                        CodeMap element, ScaleSource scale) {
  const std::int64_t n = w.view().numel();
  Microscaled out{false, std::vector<std::uint8_t>(static_cast<std::size_t>(n / group_size)),
                  std::vector<std::uint8_t>(static_cast<std::size_t>(n))};
  out.finite = set.encode_microscaled({{w.dtype, w.bytes.data()},
                                       n / group_size,
                                       group_size,
                                       element,
                                       scale,
                                       out.scales.data(),
                                       out.codes.data()});
  return out;
}

TEST(GroupedPrimitives, MicroscaledCodesAgreeOnEverySet) {
  struct Form {
    std::int64_t group_size;
    CodeMap element;
    ScaleSource scale;
  };
  const Form forms[] = {{32, CodeMap::kE2M1, ScaleSource::kE8M0},
                        {32, CodeMap::kE4M3, ScaleSource::kE8M0},
                        {16, CodeMap::kE2M1, ScaleSource::kE4M3}};
  for (const DType dtype : kTypes) {
    const Tensor w = weights_of(dtype, 40, 12);
    for (const Form& f : forms) {
      const Microscaled truth =
          microscaled(grouped_kernels_scalar(), w, f.group_size, f.element, f.scale);
      ASSERT_TRUE(truth.finite);
      for (const GroupedKernels* set : vector_sets()) {
        const Microscaled own = microscaled(*set, w, f.group_size, f.element, f.scale);
        EXPECT_TRUE(own.finite);
        EXPECT_EQ(own.scales, truth.scales) << set->name << " " << dtype_name(dtype);
        EXPECT_EQ(own.codes, truth.codes) << set->name << " " << dtype_name(dtype);
      }
    }
  }
}

TEST(GroupedPrimitives, NotFiniteIsSeenWhereverItIs) {
  std::vector<const GroupedKernels*> sets = vector_sets();
  sets.push_back(&grouped_kernels_scalar());
  for (const DType dtype : kTypes) {
    for (const std::int64_t at : {0, 31, 32, 100, 255}) {
      for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
        Tensor w = weights_of(dtype, 1, 13);
        narrow_from_f32(dtype, &bad, 1,
                        w.bytes.data() + static_cast<std::size_t>(at) * dtype_size(dtype));
        for (const GroupedKernels* set : sets) {
          EXPECT_FALSE(anchored(*set, w, kRowWeights, 64, 4).finite) << set->name << at << bad;
          EXPECT_FALSE(microscaled(*set, w, 32, CodeMap::kE2M1, ScaleSource::kE8M0).finite)
              << set->name << at << bad;
        }
      }
    }
  }
}

TEST(GroupedPrimitives, NarrowingRoundsHalfToEven) {
  Random random(14);
  std::vector<float> in;
  for (int i = 0; i < 20003; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random.next()));
    in.push_back(std::isnan(x) ? 1.0F : x);
  }
  for (const float x : {0.0F, -0.0F, 65519.99F, 65520.0F, 0x1p-25F, 0x1.8p-25F, 0x1.002p0F}) {
    in.push_back(x);
  }
  const auto n = static_cast<std::int64_t>(in.size());
  for (const DType dtype : kTypes) {
    Tensor truth = make_tensor(dtype, {n}), own = make_tensor(dtype, {n});
    narrow_from_f32(dtype, in.data(), n, truth.bytes.data());
    for (const GroupedKernels* set : vector_sets()) {
      set->narrow(dtype, in.data(), n, own.bytes.data());
      EXPECT_EQ(own.bytes, truth.bytes) << set->name << " " << dtype_name(dtype);
    }
  }
}

TEST(SmallFloat, NearestE4M3OfEveryMidpoint) {
  for (unsigned code = 0; code < 0x7E; ++code) {
    const float low = kE4M3Values[code], high = kE4M3Values[code + 1];
    ASSERT_EQ(e4m3_magnitude(static_cast<std::uint8_t>(code)), low);
    EXPECT_EQ(e4m3_from_f32(low), code);
    const float middle = low + (high - low) / 2;
    EXPECT_EQ(e4m3_from_f32(middle), code + code % 2) << "half to even";
    EXPECT_EQ(e4m3_from_f32(std::nextafter(middle, 0.0F)), code);
    EXPECT_EQ(e4m3_from_f32(std::nextafter(middle, 1e9F)), code + 1);
    EXPECT_EQ(e4m3_from_f32(-low), code | 0x80u);
  }
  EXPECT_EQ(e4m3_from_f32(448.0F), 0x7E);
  EXPECT_EQ(e4m3_from_f32(1e30F), 0x7E) << "saturates";
  EXPECT_EQ(e4m3_from_f32(-HUGE_VALF), 0xFE);
}

TEST(SmallFloat, LogarithmIsExactAtEveryPowerOfTwo) {
  for (int e = -149; e <= 127; ++e) {
    const float power = std::ldexp(1.0F, e);
    EXPECT_EQ(ceil_log2(power), e);
    EXPECT_EQ(power_of_two(e), power);
    if (e < 127) EXPECT_EQ(ceil_log2(std::nextafter(power, HUGE_VALF)), e + 1);
  }
}

TEST(SmallFloat, E2M1TiesTakeTheLowerCode) {
  const float ties[][2] = {{0.25F, 0}, {0.75F, 1},  {1.25F, 2},  {1.75F, 3},
                           {2.5F, 4},  {3.5F, 5},   {5.0F, 6},   {-0.25F, 0},
                           {-0.0F, 0}, {-0.75F, 9}, {-5.0F, 14}, {1e30F, 0}};
  for (const auto& [v, code] : ties) EXPECT_EQ(nearest_e2m1(v), static_cast<int>(code)) << v;
  EXPECT_EQ(nearest_e2m1(std::nanf("")), 0);
  EXPECT_EQ(nearest_e2m1(-700.0F), 15);
}

}  // namespace
}  // namespace quantal::testing

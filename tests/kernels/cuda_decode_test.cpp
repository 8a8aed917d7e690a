// The decode functions that CUDA kernels share with the host, against the scalar reference: every
// code of every form.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "kernels/cuda/halves_inl.h"
#include "kernels/ref/ref.h"
#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

using namespace quantal::cuda;  // NOLINT: what is tested

/// Equal bits; any NaN equals any NaN.
bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) ||
         (std::isnan(a) && std::isnan(b));
}

Table table_of(const Matrix& m) { return {m.table != nullptr ? m.table : m.fixed, 1}; }

/// Whole pairs of a row as kernels decode them.
template <int kBits>
std::vector<float> decode_row(const Matrix& m, std::int64_t row) {
  std::vector<float> out(static_cast<std::size_t>(m.cols));
  const RowStart start = row_start(m, row);
  const std::uint8_t* codes = m.codes + row * m.code_bytes;
  for (std::uint32_t chunk = 0; chunk * kChunk < m.cols; ++chunk) {
    const RawPair raw = load_pair<kBits>(codes, m.code_bytes, chunk / 2);
    float* v = out.data() + chunk * kChunk;
    const auto decode = [&]<Values kValues>(std::integral_constant<Values, kValues>) {
      decode_chunk<kBits, kValues>(m, table_of(m), start, raw, chunk / 2, chunk % 2, v);
    };
    switch (m.values) {
      case Values::kNumber:
        decode(std::integral_constant<Values, Values::kNumber>{});
        break;
      case Values::kTable:
        decode(std::integral_constant<Values, Values::kTable>{});
        break;
      case Values::kE4M3:
        decode(std::integral_constant<Values, Values::kE4M3>{});
        break;
      case Values::kE5M2:
        decode(std::integral_constant<Values, Values::kE5M2>{});
        break;
    }
  }
  return out;
}

TEST(CudaDecode, EveryFormHasTheReferencesBits) {
  std::uint64_t seed = 700;
  for (const PackedSpec& spec : kernel_specs()) {
    ++seed;
    const PackedMatrix w = random_packed(spec, seed, seed % 2 == 0);
    const Matrix m = matrix_of(w.view());
    for (std::int64_t r = 0; r < spec.rows; ++r) {
      for (std::int64_t c = 0; c < spec.cols; ++c) {
        const float v = value_at(m, table_of(m), r, c), expected = ref::value(w.view(), r, c);
        ASSERT_TRUE(same(v, expected)) << v << " is not " << expected << " at " << r << ", " << c
                                       << ": " << describe(spec) << " seed " << seed;
      }
    }
  }
}

TEST(CudaDecode, ChunksHaveTheReferencesBits) {
  std::uint64_t seed = 1700;
  int forms = 0;
  for (const PackedSpec& spec : kernel_specs()) {
    ++seed;
    if (!whole_chunks(spec)) continue;
    ++forms;
    const PackedMatrix w = random_packed(spec, seed, seed % 2 == 0);
    const Matrix m = matrix_of(w.view());
    for (std::int64_t r = 0; r < spec.rows; ++r) {
      std::vector<float> row;
      with_width(m.bits, [&](auto bits) { row = decode_row<decltype(bits)::value>(m, r); });
      for (std::int64_t c = 0; c < spec.cols; ++c) {
        const float v = row[static_cast<std::size_t>(c)], expected = ref::value(w.view(), r, c);
        ASSERT_TRUE(same(v, expected)) << v << " is not " << expected << " at " << r << ", " << c
                                       << ": " << describe(spec) << " seed " << seed;
      }
    }
  }
  EXPECT_GT(forms, 500);
}

/// Whole chunks of a row as halves, widened.
template <int kBits, FloatKind kKind>
std::vector<float> decode_halves(const Matrix& m, std::int64_t row) {
  std::vector<float> out(static_cast<std::size_t>(m.cols));
  const RowStart start = row_start(m, row);
  for (std::uint32_t chunk = 0; chunk * kChunk < m.cols; ++chunk) {
    const RawPair raw = load_pair<kBits>(m.codes + row * m.code_bytes, m.code_bytes, chunk / 2);
    const RawHalves stats = load_halves(m, start, m.group.quotient(start.phase + chunk * kChunk));
    const HalfForm form = half_form<kKind>(m);
    std::uint32_t words[kChunk / 2];
    halves_of_chunk<kKind>(chunk_of<kBits>(raw, chunk / 2, chunk % 2), form.minus_origin,
                           half_rule<kKind>(form, stats), words);
    for (std::uint32_t j = 0; j < kChunk; ++j) {
      out[chunk * kChunk + j] =
          of_half<kKind>(static_cast<std::uint16_t>(words[j / 2] >> (16 * (j % 2))));
    }
  }
  return out;
}

void expect_halves(const PackedMatrix& w, const std::string& what) {
  const Matrix m = matrix_of(w.view());
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    std::vector<float> row;
    with_width(m.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if constexpr (kBits <= kMaxHalfBits) {
        row = m.value_kind == FloatKind::kF16 ? decode_halves<kBits, FloatKind::kF16>(m, r)
                                              : decode_halves<kBits, FloatKind::kBF16>(m, r);
      }
    });
    for (std::int64_t c = 0; c < w.spec.cols; ++c) {
      const float v = row[static_cast<std::size_t>(c)], expected = ref::value(w.view(), r, c);
      ASSERT_TRUE(same(v, expected))
          << v << " is not " << expected << " at " << r << ", " << c << ": " << what;
    }
  }
}

TEST(CudaDecode, HalvesOfEveryFormThatHasThem) {
  std::uint64_t seed = 2700;
  int forms = 0;
  for (const PackedSpec& spec : kernel_specs()) {
    ++seed;
    if (!whole_chunks(spec) || spec.rows == 0) continue;
    const PackedMatrix w = random_packed(spec, seed, seed % 2 == 0);
    const Matrix m = matrix_of(w.view());
    if (!decodes_to_halves(m, m.value_kind)) continue;
    ++forms;
    expect_halves(w, describe(spec) + " seed " + std::to_string(seed));
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(forms, 60);
}

TEST(CudaDecode, HalvesOfEveryCodeUnderStatisticsOfAnyBits) {
  for (const auto& [value, scale] :
       {std::pair{DType::kF16, ScaleSource::kF16}, std::pair{DType::kBF16, ScaleSource::kBF16}}) {
    for (int bits : {1, 2, 3, 4, 5, 6}) {
      for (Offset offset : {Offset::kNone, Offset::kBias, Offset::kShift, Offset::kZeroPoint}) {
        for (int centre : {0, 1, 1 << (bits - 1), 64}) {
          const PackedSpec spec{.rows = 8,
                                .cols = 2048,
                                .bits = bits,
                                .centre = centre,
                                .offset = offset,
                                .scale = scale,
                                .value_dtype = value,
                                .group_size = 64};
          if (centre > 0 && offset == Offset::kZeroPoint) continue;
          PackedMatrix w = random_packed(spec, 11);
          ASSERT_TRUE(decodes_to_halves(matrix_of(w.view()), static_cast<FloatKind>(value)));
          for (std::int64_t r = 0; r < spec.rows; ++r) {
            std::vector<std::uint8_t> codes(2048);
            for (std::size_t c = 0; c < codes.size(); ++c) {
              codes[c] = static_cast<std::uint8_t>(c & ((1U << static_cast<unsigned>(bits)) - 1U));
            }
            pack_row(bits, codes.data(), 2048, w.codes.data() + r * matrix_of(w.view()).code_bytes);
          }
          Random random(31);  // any bits: denormals, infinities and NaN too
          for (auto& byte : w.stats) byte = static_cast<std::uint8_t>(random.below(256));
          expect_halves(w, describe(spec));
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CudaDecode, OnlyFormsOfOneTypeDecodeToHalves) {
  const PackedSpec good{.rows = 2,
                        .cols = 64,
                        .offset = Offset::kZeroPoint,
                        .scale = ScaleSource::kBF16,
                        .value_dtype = DType::kBF16};
  const auto taken = [](const PackedSpec& spec, FloatKind kind) {
    const PackedMatrix w = random_packed(spec, 3);
    return decodes_to_halves(matrix_of(w.view()), kind);
  };
  EXPECT_TRUE(taken(good, FloatKind::kBF16));
  EXPECT_FALSE(taken(good, FloatKind::kF16));
  PackedSpec other = good;
  other.scale = ScaleSource::kF32;
  EXPECT_FALSE(taken(other, FloatKind::kBF16));
  other = good;
  other.value_dtype = DType::kF32;
  EXPECT_FALSE(taken(other, FloatKind::kBF16));
  other = good;
  other.bits = 8;
  EXPECT_FALSE(taken(other, FloatKind::kBF16));
  other = good;
  other.offset = Offset::kNone;
  other.centre = 65;
  EXPECT_FALSE(taken(other, FloatKind::kBF16));
  other = good;
  other.code_map = CodeMap::kNf4;
  other.offset = Offset::kNone;
  EXPECT_FALSE(taken(other, FloatKind::kBF16));
}

TEST(CudaDecode, EveryCodeOfEveryMapUnderEveryRule) {
  for (int map = 0; map <= static_cast<int>(CodeMap::kE5M2); ++map) {
    const bool float8 = map >= static_cast<int>(CodeMap::kE4M3);
    for (int bits : kWidths) {
      for (int offset = 0; offset <= static_cast<int>(Offset::kOver127); ++offset) {
        for (DType value : kValueTypes) {
          PackedSpec spec{.rows = 1,
                          .cols = 256,
                          .bits = bits,
                          .code_map = static_cast<CodeMap>(map),
                          .centre = map == 0 ? 1 << (bits - 1) : 0,
                          .offset = static_cast<Offset>(offset),
                          .value_dtype = value,
                          .group_size = 256};
          if (map != 0 && bits != (float8 ? 8 : 4)) continue;
          PackedMatrix w = random_packed(spec, 5);
          std::vector<std::uint8_t> codes(256);
          for (std::size_t c = 0; c < 256; ++c) {
            codes[c] = static_cast<std::uint8_t>(c & ((1U << static_cast<unsigned>(bits)) - 1U));
          }
          pack_row(bits, codes.data(), 256, w.codes.data());
          const Matrix m = matrix_of(w.view());
          for (std::int64_t c = 0; c < 256; ++c) {
            ASSERT_TRUE(same(value_at(m, table_of(m), 0, c), ref::value(w.view(), 0, c)))
                << describe(spec) << " code " << c;
          }
        }
      }
    }
  }
}

TEST(CudaDecode, SmallFloatsOfEveryCode) {
  for (std::uint32_t code = 0; code < 256; ++code) {
    EXPECT_TRUE(same(of_e4m3(code), kE4M3Values[code])) << code;
    EXPECT_TRUE(same(of_e5m2(code), kE5M2Values[code])) << code;
    EXPECT_TRUE(same(of_e8m0(code), std::ldexp(1.0F, static_cast<int>(code) - 127))) << code;
  }
}

TEST(CudaDecode, DividersAreExactUpToTheLargestPosition) {
  Random random(9);
  for (std::int64_t d : {1, 2, 3, 5, 7, 16, 24, 48, 64, 100, 127, 128, 255, 256, 641, 4096, 5000,
                         (1 << 24) - 1, 1 << 24}) {
    const Divider divider = divider_of(d);
    for (int i = 0; i < 2000; ++i) {
      const std::int64_t q = random.below((std::int64_t{1} << 31) / d);
      for (std::int64_t n :
           {q * d - 1, q * d, q * d + d - 1, random.below(std::int64_t{1} << 31)}) {
        if (n < 0 || n >= std::int64_t{1} << 31) continue;
        ASSERT_EQ(divider.quotient(static_cast<std::uint32_t>(n)), n / d) << n << " / " << d;
      }
    }
  }
}

TEST(CudaDecode, PhasesBeyondTheRowStayInsideTheBuffers) {
  const PackedSpec spec{.rows = 3,
                        .cols = 112,
                        .code_map = CodeMap::kNf4,
                        .scale = ScaleSource::kNestedU8,
                        .group_size = 64,
                        .nested_group_size = 2};
  PackedMatrix w = random_packed(spec, 6);
  const PackedLayout layout = layout_of(spec);
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    std::memset(w.stats.data() + r * layout.stat_bytes, 0xFF, 4);
  }
  const Matrix m = matrix_of(w.view());
  for (std::int64_t r = 0; r < spec.rows; ++r) {  // asan watches
    for (std::int64_t c = 0; c < spec.cols; ++c) value_at(m, table_of(m), r, c);
    EXPECT_EQ(decode_row<4>(m, r).size(), 112U);
  }
}

TEST(CudaDecode, RefusesWhatPointersAndPositionsCannotBe) {
  const PackedSpec spec{.rows = 2, .cols = 64};
  const PackedMatrix w = random_packed(spec, 3);
  std::vector<std::uint8_t> moved(w.codes.size() + 32);
  PackedView view = w.view();
  const auto address = reinterpret_cast<std::uintptr_t>(moved.data());
  view.codes = std::span(moved).subspan(16 - address % 16 + 8, w.codes.size());
  try {
    matrix_of(view);
    FAIL() << "misaligned codes were taken";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "cuda: codes begin 8 bytes behind a multiple of 16, expected a multiple");
  }
  view = w.view();
  view.codes = view.codes.first(16);
  EXPECT_THROW(matrix_of(view), Error);
  PackedSpec wide{.rows = 1, .cols = std::int64_t{1} << 31, .bits = 8, .group_size = 64};
  const PackedLayout layout = layout_of(wide);
  PackedView huge{
      wide,
      {static_cast<const std::uint8_t*>(nullptr), static_cast<std::size_t>(layout.code_bytes)},
      {static_cast<const std::uint8_t*>(nullptr), static_cast<std::size_t>(layout.stat_bytes)},
      {}};
  EXPECT_THROW(matrix_of(huge), Error);
}

}  // namespace
}  // namespace quantal::testing

// Spec, layout, strips and statistics of a packed matrix.
#include <gtest/gtest.h>

#include <numeric>

#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

TEST(Packed, SpecSurvivesItsIntegers) {
  for (const PackedSpec& spec : kernel_specs()) {
    const auto ints = spec_to_ints(spec);
    EXPECT_EQ(ints[0], kLayoutVersion);
    EXPECT_EQ(spec_from_ints(ints), spec) << describe(spec);
  }
}

TEST(Packed, EveryDamagedIntegerIsRefused) {
  const auto good = spec_to_ints({.rows = 4, .cols = 64, .code_map = CodeMap::kNf4});
  const auto refused = [&](std::size_t index, std::int64_t value) {
    auto ints = good;
    ints[index] = value;
    try {
      spec_from_ints(ints);
    } catch (const Error& e) {
      return std::string(e.what()).find("expected") != std::string::npos;
    }
    return false;
  };
  for (std::size_t i : {0U, 1U, 2U, 3U, 4U, 6U, 7U, 8U, 9U, 10U, 11U, 12U, 14U, 15U}) {
    EXPECT_TRUE(refused(i, -1)) << i;
    EXPECT_TRUE(refused(i, INT64_MAX)) << i;
  }
  EXPECT_TRUE(refused(3, 7));                             // width
  EXPECT_TRUE(refused(8, static_cast<int>(DType::kU8)));  // value type
  EXPECT_THROW(spec_from_ints(std::span(good).first(15)), Error);
}

TEST(Packed, IllegalCombinationsAreRefused) {
  const PackedSpec illegal[] = {
      {.rows = 4, .cols = 64, .bits = 7},
      {.rows = 4, .cols = 64, .bits = 0},
      {.rows = 4, .cols = 64, .bits = 9},
      {.rows = 4, .cols = 64, .bits = 8, .code_map = CodeMap::kNf4},
      {.rows = 4, .cols = 64, .bits = 3, .code_map = CodeMap::kTable},
      {.rows = 4, .cols = 64, .bits = 4, .code_map = CodeMap::kE4M3},
      {.rows = 4, .cols = 64, .offset = Offset::kBias, .scale = ScaleSource::kNestedU8},
      {.rows = 4, .cols = 64, .offset = Offset::kBias, .scale = ScaleSource::kE8M0},
      {.rows = 4, .cols = 64, .offset = Offset::kOver127, .scale = ScaleSource::kE4M3},
      {.rows = 4,
       .cols = 512,
       .offset = Offset::kOver127,
       .scale = ScaleSource::kSuperU8,
       .nested_group_size = 8},
      {.rows = 4,
       .cols = 512,
       .offset = Offset::kShift,
       .scale = ScaleSource::kSuperI8,
       .nested_group_size = 8},
      {.rows = 4, .cols = 512, .scale = ScaleSource::kSuperU4, .nested_group_size = 8},
      {.rows = 4, .cols = 256, .scale = ScaleSource::kSuperI8, .nested_group_size = 8},
      {.rows = 4,
       .cols = 512,
       .scale = ScaleSource::kSuperI8,
       .group_map = GroupMap::kColumnRuns,
       .nested_group_size = 8},
      {.rows = 4, .cols = 64, .group_map = GroupMap::kColumnRuns, .group_size = 48},
      {.rows = 4, .cols = 64, .group_map = GroupMap::kColumnBlocks, .group_size = 3},
      {.rows = 4, .cols = 64, .scale = ScaleSource::kNestedU8, .group_map = GroupMap::kColumnRuns},
      {.rows = 4, .cols = 0},
      {.rows = std::int64_t{1} << 47, .cols = std::int64_t{1} << 16},  // bytes overflow
      {.rows = 4, .cols = 64, .residue_bytes = -1},
      {.rows = 4, .cols = 64, .nested_group_size = 257}};
  for (const PackedSpec& spec : illegal) EXPECT_THROW(validate_spec(spec), Error) << describe(spec);
}

TEST(Packed, SlotsAreTheMostGroupsThatARowTouches) {
  for (const PackedSpec& base : kernel_specs()) {
    if (base.group_map != GroupMap::kRowRuns) continue;
    PackedSpec spec = base;
    const PackedLayout layout = layout_of(spec);
    std::int64_t most = 0, most_nested = 0;
    // Phases repeat after group_size rows, nested ones after nested_group_size times as many.
    const std::int64_t period =
        std::min<std::int64_t>(spec.group_size * spec.nested_group_size, 20000);
    for (std::int64_t r = 0; r < period; ++r) {
      const std::int64_t first = r * spec.cols / spec.group_size;
      const std::int64_t last = ((r + 1) * spec.cols - 1) / spec.group_size;
      most = std::max(most, last - first + 1);
      most_nested =
          std::max(most_nested, last / spec.nested_group_size - first / spec.nested_group_size + 1);
    }
    EXPECT_EQ(layout.slots, most) << describe(spec);
    if (spec.scale == ScaleSource::kNestedU8) {
      EXPECT_GE(layout.nested_slots, most_nested) << describe(spec);
      EXPECT_LE(layout.nested_slots, most_nested + 1) << describe(spec);
    }
  }
}

/// Bits [shift, shift + width) of a code, read from a plane of strips as the header defines it.
unsigned plane_field(const std::uint8_t* plane, std::size_t width, std::size_t code) {
  const std::size_t per_strip = 128 / width;
  const std::size_t in_strip = code % per_strip;
  const unsigned byte = plane[code / per_strip * 16 + in_strip % 16];
  return (byte >> (width * (in_strip / 16))) & ((1U << width) - 1U);
}

TEST(Packed, PlanesAreInterleavedByUnit) {
  struct Width {
    int bits;
    std::size_t low, high, codes, bytes;
  };
  for (const Width& w : {Width{1, 1, 0, 128, 16}, Width{2, 2, 0, 64, 16}, Width{3, 2, 1, 128, 48},
                         Width{4, 4, 0, 32, 16}, Width{5, 4, 1, 128, 80}, Width{6, 4, 2, 64, 48},
                         Width{8, 8, 0, 16, 16}}) {
    EXPECT_EQ(unit_codes(w.bits), static_cast<std::int64_t>(w.codes));
    EXPECT_EQ(unit_bytes(w.bits), static_cast<std::int64_t>(w.bytes));
    Random random(static_cast<std::uint64_t>(w.bits));
    std::vector<std::uint8_t> codes(2 * w.codes + w.codes / 2 + 1);
    for (auto& c : codes) c = static_cast<std::uint8_t>(random.below(1 << w.bits));
    std::vector<std::uint8_t> packed(3 * w.bytes, 0xFF);
    pack_row(w.bits, codes.data(), static_cast<std::int64_t>(codes.size()), packed.data());
    for (std::size_t i = 0; i < 3 * w.codes; ++i) {
      const std::uint8_t* unit = packed.data() + i / w.codes * w.bytes;
      unsigned code = plane_field(unit, w.low, i % w.codes);
      if (w.high != 0) {
        code |= plane_field(unit + w.codes * w.low / 8, w.high, i % w.codes) << w.low;
      }
      EXPECT_EQ(code, i < codes.size() ? codes[i] : 0U) << w.bits << " bits, code " << i;
    }
  }
  EXPECT_THROW(unit_codes(7), Error);
  EXPECT_THROW(unit_bytes(0), Error);
}

TEST(Packed, PackAndUnpackAreInverseForEveryLengthAndCode) {
  for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
    for (std::int64_t cols = 1; cols <= 300; ++cols) {
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(cols)), back(codes.size());
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] =
            static_cast<std::uint8_t>((i * 37 + static_cast<std::size_t>(cols)) % (1U << bits));
      }
      const PackedLayout layout = layout_of({.rows = 1, .cols = cols, .bits = bits});
      std::vector<std::uint8_t> packed(static_cast<std::size_t>(layout.code_bytes), 0xFF);
      pack_row(bits, codes.data(), cols, packed.data());
      unpack_row(bits, packed.data(), cols, back.data());
      EXPECT_EQ(back, codes) << bits << " bits, " << cols << " columns";
      std::vector<std::uint8_t> padded(
          static_cast<std::size_t>(ceil_div(cols, unit_codes(bits)) * unit_codes(bits)));
      unpack_row(bits, packed.data(), static_cast<std::int64_t>(padded.size()), padded.data());
      for (std::size_t i = codes.size(); i < padded.size(); ++i) EXPECT_EQ(padded[i], 0);
    }
  }
}

TEST(Packed, GatherIsTheInverseOfSpreadAndShardsAgree) {
  for (const PackedSpec& spec : kernel_specs()) {
    if (spec.group_map != GroupMap::kRowRuns || spec.rows == 0) continue;
    const PackedMatrix w = random_packed(spec, 42);
    const GatheredStats flat = gather_stats(w.view());
    const auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    const FlatStats from{flat.scales.data(), data(flat.offsets), data(flat.absmax2),
                         data(flat.supers), data(flat.super_offsets)};
    PackedMatrix again = make_packed(spec);
    spread_stats(spec, from, 0, again.stats.data(), ThreadExecutor());
    EXPECT_EQ(again.stats, w.stats) << describe(spec);
    // A shard of the last rows holds the same bytes as those rows of the whole.
    const std::int64_t cut = spec.rows / 2;
    PackedSpec part = spec;
    part.rows = spec.rows - cut;
    PackedMatrix shard = make_packed(part);
    spread_stats(part, from, cut, shard.stats.data(), OddExecutor());
    const auto skip = static_cast<std::ptrdiff_t>(cut * layout_of(spec).stat_bytes);
    EXPECT_TRUE(std::equal(shard.stats.begin(), shard.stats.end(), w.stats.begin() + skip))
        << describe(spec);
  }
}

TEST(Packed, LayoutsOfTheNewScaleSources) {
  PackedSpec q4{.rows = 2,
                .cols = 512,
                .offset = Offset::kShift,
                .scale = ScaleSource::kSuperU8,
                .group_size = 32,
                .nested_group_size = 8};
  PackedLayout layout = layout_of(q4);  // 16 sub-scales, 16 sub-offsets, 2 supers, 2 super-offsets
  EXPECT_EQ(layout.stat_bytes, 16 + 16 + 4 + 4);
  EXPECT_EQ(layout.nested_slots, 2);
  EXPECT_FALSE(layout.has_header);
  q4.scale = ScaleSource::kSuperU4;  // one byte for both
  EXPECT_EQ(layout_of(q4).stat_bytes, 16 + 4 + 4);
  q4.scale = ScaleSource::kSuperI8;
  q4.offset = Offset::kNone;
  EXPECT_EQ(layout_of(q4).stat_bytes, 16 + 4);
  EXPECT_EQ(
      layout_of({.rows = 2, .cols = 64, .scale = ScaleSource::kE8M0, .group_size = 32}).stat_bytes,
      2);
  layout = layout_of({.rows = 6,
                      .cols = 10,
                      .offset = Offset::kShift,
                      .scale = ScaleSource::kF16,
                      .group_map = GroupMap::kColumnBlocks,
                      .group_size = 3});
  EXPECT_EQ(layout.stat_rows, 20);
  EXPECT_EQ(layout.stat_bytes, 4);
  // A row's largest weight is stored alone; the dialect's residue is at the end of shared.
  layout = layout_of({.rows = 2,
                      .cols = 48,
                      .bits = 8,
                      .offset = Offset::kOver127,
                      .group_size = 48,
                      .residue_bytes = 5});
  EXPECT_EQ(layout.stat_bytes, 4);
  EXPECT_EQ(layout.shared_bytes, 5);
}

TEST(Packed, WorkedExampleOfTheConceptsPage) {
  const PackedSpec spec{.rows = 2, .cols = 48, .offset = Offset::kZeroPoint, .group_size = 32};
  const PackedLayout layout = layout_of(spec);
  EXPECT_EQ(layout.code_bytes, 32);
  EXPECT_EQ(layout.slots, 2);
  EXPECT_EQ(layout.stat_bytes, 20);
  EXPECT_EQ(layout.total_bytes(spec), 104);
  PackedMatrix w = make_packed(spec);
  const float scales[] = {0.5F, 0.25F, 2.0F}, zeros[] = {1.0F, 2.0F, 3.0F};
  spread_stats(spec,
               {reinterpret_cast<const std::uint8_t*>(scales),
                reinterpret_cast<const std::uint8_t*>(zeros), nullptr},
               0, w.stats.data(), serial_executor());
  const auto stat = [&w](std::size_t at) {
    float v = 0;
    std::memcpy(&v, w.stats.data() + at, 4);
    return v;
  };
  EXPECT_EQ(w.stats[0], 0);    // row 0: phase 0, s0 s1 z0 z1
  EXPECT_EQ(w.stats[20], 16);  // row 1: phase 16, s1 s2 z1 z2
  EXPECT_EQ(stat(4), scales[0]);
  EXPECT_EQ(stat(24), scales[1]);
  EXPECT_EQ(stat(28), scales[2]);
  EXPECT_EQ(stat(36), zeros[2]);
  w.codes[32 + 4] = 0xB0;  // row 1, strip 0, byte 4, high nibble: column 20 has code 11
  std::vector<float> out(96);
  dequantize(w.view(), {0, 2, 0, 48}, DType::kF32, out.data(), 48, serial_executor());
  EXPECT_EQ(out[48 + 20], (11.0F - zeros[2]) * scales[2]);
}

TEST(Packed, RowsThatDisagreeAboutASharedGroupAreCorrupt) {
  PackedMatrix w = random_packed({.rows = 2, .cols = 96, .group_size = 64}, 4);
  const PackedLayout layout = layout_of(w.spec);  // header, then 2 slots; group 1 is in both rows
  w.stats[static_cast<std::size_t>(layout.stat_bytes) + 4] ^= 1;
  try {
    gather_stats(w.view());
    FAIL() << "expected Error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::kCorrupt);
    EXPECT_NE(std::string(e.what()).find("scale of group 1 in row 1"), std::string::npos)
        << e.what();
  }
}

TEST(Packed, BuffersOfTheWrongSizeAreRefused) {
  const PackedMatrix good = random_packed({.rows = 3, .cols = 64, .code_map = CodeMap::kTable}, 5);
  EXPECT_NO_THROW(check_packed(good.view()));
  for (int which = 0; which < 3; ++which) {
    PackedMatrix bad = good;
    (which == 0 ? bad.codes : which == 1 ? bad.stats : bad.shared).push_back(0);
    EXPECT_THROW(check_packed(bad.view()), Error) << which;
  }
  EXPECT_EQ(layout_of(good.spec).total_bytes(good.spec),
            static_cast<std::int64_t>(good.codes.size() + good.stats.size() + good.shared.size()));
}

}  // namespace
}  // namespace quantal::testing

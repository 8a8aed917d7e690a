// Conversions between dialects that users rely on, each checked by its own formula.
#include "quantal/transcode.h"

#include <gtest/gtest.h>

#include "formats/transcode_support.h"
#include "quantal/ggml.h"

namespace quantal::testing {
namespace {

using M = QuantizationMethod;

TranscodeTarget target(const char* dialect, DType dtype, const char* mode = "", int bits = 0,
                       std::int64_t group = 0) {
  TranscodeTarget to;
  to.dialect = &dialect_by_name(dialect);
  to.options.method = M::NONE;
  to.options.bits = bits;
  to.options.group_size = group;
  to.options.value_dtype = dtype;
  to.options.mode = mode;
  to.options.double_quant = false;
  to.options.quant_type = "";
  return to;
}

PackedMatrix blocks(GgmlType type, std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  return random_form(ggml_spec(type, rows, cols), Kind::kMixed, seed);
}

void expect_lossless(const Transcoded& t, DType dtype) {
  EXPECT_TRUE(t.kept.lossless()) << t.kept.note;
  EXPECT_EQ(t.kept.statistics_ulp, 0);
  EXPECT_EQ(t.kept.values_dtype, dtype);
  EXPECT_EQ(t.relative_error, 0);
}

TEST(Transcode, Q4_1ToMlxKeepsEverythingInFloat32) {
  const PackedMatrix w = blocks(GgmlType::kQ4_1, 7, 320, 11);
  const Transcoded t = transcode(w.view(), target("mlx", DType::kF32), serial_executor());
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(t.matrix.spec.group_size, 32);
  EXPECT_EQ(t.matrix.codes, w.codes);
  const auto from = transcoding::read_statistics(w.view());
  const auto to = transcoding::read_statistics(t.matrix.view());
  EXPECT_EQ(to.scales, from.scales);
  EXPECT_EQ(to.offsets, from.offsets);
  EXPECT_EQ(decode(t.matrix, DType::kF32).bytes, decode(w, DType::kF32).bytes);
  // The same numbers fit f16, but there MLX rounds the product before it adds.
  const Transcoded half = transcode(w.view(), target("mlx", DType::kF16), serial_executor());
  EXPECT_TRUE(half.kept.statistics);
  EXPECT_FALSE(half.kept.values);
  EXPECT_LT(half.relative_error, 0x1p-10);
  expect_same_bytes(
      transcode(t.matrix.view(), target("gguf", DType::kF32), serial_executor()).matrix, w,
      "way back");
  expect_same_bytes(
      transcode(half.matrix.view(), target("gguf", DType::kF32), serial_executor()).matrix, w,
      "way back from f16");
}

TEST(Transcode, Q4_1ToQuantoNegatesTheBias) {
  const PackedMatrix w = blocks(GgmlType::kQ4_1, 6, 160, 12);  // 160: upstream's rule gives 32
  const Transcoded t = transcode(w.view(), target("quanto", DType::kF32), serial_executor());
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(t.matrix.spec.group_size, 32);
  EXPECT_EQ(t.matrix.spec.offset, Offset::kShift);
  const auto from = transcoding::read_statistics(w.view());
  const auto to = transcoding::read_statistics(t.matrix.view());
  for (std::size_t g = 0; g < from.offsets.size(); ++g) EXPECT_EQ(to.offsets[g], -from.offsets[g]);
  // 256 columns: Quanto groups 128, which random blocks do not share.
  const PackedMatrix wide = blocks(GgmlType::kQ4_1, 2, 256, 12);
  const Preservation plan = plan_transcode(wide.spec, target("quanto", DType::kF32));
  EXPECT_NE(plan.note.find("depends on the values"), std::string::npos);
  EXPECT_FALSE(transcode(wide.view(), target("quanto", DType::kF32), serial_executor()).kept.codes);
  const Transcoded exact = transcode(
      wide.view(), target("quanto", DType::kF32, "exact_group", 0, 32), serial_executor());
  expect_lossless(exact, DType::kF32);
}

TEST(Transcode, Q8_0ToMlxHasBiasOf128Scales) {
  const PackedMatrix w = blocks(GgmlType::kQ8_0, 5, 96, 13);
  const Transcoded t = transcode(w.view(), target("mlx", DType::kF32), serial_executor());
  expect_lossless(t, DType::kF32);
  const auto from = transcoding::read_statistics(w.view());
  const auto to = transcoding::read_statistics(t.matrix.view());
  EXPECT_EQ(to.scales, from.scales);
  for (std::size_t g = 0; g < from.scales.size(); ++g) {
    EXPECT_EQ(to.offsets[g], -128.0F * from.scales[g]);
  }
  expect_same_bytes(
      transcode(t.matrix.view(), target("gguf", DType::kF32), serial_executor()).matrix, w,
      "way back");
}

TEST(Transcode, Q4_1ToHqqRoundsTheZeroOnceAndComesBack) {
  const PackedMatrix w = blocks(GgmlType::kQ4_1, 64, 512, 14);
  const Transcoded t = transcode(w.view(), target("hqq", DType::kF32), serial_executor());
  EXPECT_TRUE(t.kept.codes);
  EXPECT_FALSE(t.kept.statistics);
  EXPECT_GT(t.kept.statistics_ulp, 0.25);
  EXPECT_LE(t.kept.statistics_ulp, 0.5);
  const auto from = transcoding::read_statistics(w.view());
  const auto to = transcoding::read_statistics(t.matrix.view());
  const std::vector<float> a = all_values(w), b = all_values(t.matrix);
  for (std::size_t g = 0; g < from.scales.size(); ++g) {
    if (from.scales[g] == 0) continue;
    EXPECT_EQ(to.scales[g], from.scales[g]);
    EXPECT_EQ(to.offsets[g], -from.offsets[g] / from.scales[g]);
    for (std::size_t i = 32 * g; i < 32 * (g + 1); ++i) {
      EXPECT_NEAR(a[i], b[i], 0x1p-21 * (std::fabs(from.offsets[g]) + std::fabs(a[i])));
    }
  }
  expect_same_bytes(
      transcode(t.matrix.view(), target("gguf", DType::kF32), serial_executor()).matrix, w,
      "way back");
}

TEST(Transcode, EveryPairOfHalfStatisticsComesBackFromHqq) {
  // Blocks of all scales against a sample of biases, special ones included: zeros of both signs,
  // subnormals, the largest. Kept in float32 the zero point still determines the bias.
  Random random(5);
  std::vector<std::uint16_t> biases = {0x0000, 0x8000, 0x0001, 0x8001, 0x03FF,
                                       0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC01};
  while (biases.size() < 32) {
    const auto h = static_cast<std::uint16_t>(random.below(0x10000));
    if ((h & 0x7C00) != 0x7C00) biases.push_back(h);
  }
  const std::int64_t rows = 256, cols = 32 * 256;
  std::size_t wrong = 0;
  for (std::size_t b = 0; b < biases.size(); ++b) {
    PackedMatrix w = random_form(ggml_spec(GgmlType::kQ4_1, rows, cols), Kind::kUniform, b);
    std::vector<std::uint16_t> scales, offsets;
    for (std::uint32_t h = 0; h < 0x10000; ++h) {
      const bool finite = (h & 0x7C00) != 0x7C00;
      scales.push_back(finite ? static_cast<std::uint16_t>(h) : std::uint16_t{0x3C00});
      offsets.push_back(biases[b]);
    }
    FlatStats flat;
    flat.scales = reinterpret_cast<const std::uint8_t*>(scales.data());
    flat.offsets = reinterpret_cast<const std::uint8_t*>(offsets.data());
    spread_stats(w.spec, flat, 0, w.stats.data(), serial_executor());
    const Transcoded there = transcode(w.view(), target("hqq", DType::kF32), serial_executor());
    ASSERT_TRUE(there.kept.codes);
    const Transcoded back =
        transcode(there.matrix.view(), target("gguf", DType::kF32), serial_executor());
    const GatheredStats was = gather_stats(w.view()), is = gather_stats(back.matrix.view());
    const auto* s0 = reinterpret_cast<const std::uint16_t*>(was.scales.data());
    const auto* s1 = reinterpret_cast<const std::uint16_t*>(is.scales.data());
    const auto* o0 = reinterpret_cast<const std::uint16_t*>(was.offsets.data());
    const auto* o1 = reinterpret_cast<const std::uint16_t*>(is.offsets.data());
    for (std::size_t g = 0; g < scales.size(); ++g) {
      wrong += s0[g] != s1[g] || o0[g] != o1[g];
    }
  }
  EXPECT_EQ(wrong, 0u);
}

TEST(Transcode, SymmetricBlocksBecomeAffineAndComeBack) {
  for (const GgmlType type : {GgmlType::kQ4_0, GgmlType::kQ5_0, GgmlType::kQ8_0}) {
    const PackedMatrix w = blocks(type, 4, 128, 15);
    SCOPED_TRACE(transcoding::form_name(w.spec));
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const Transcoded hqq = transcode(w.view(), target("hqq", dtype), serial_executor());
      // zero is the centre exactly; bf16 has no room for the scale's 11 bits.
      EXPECT_EQ(hqq.kept.lossless(), dtype == DType::kF32);
      const auto stats = transcoding::read_statistics(hqq.matrix.view());
      for (const float z : stats.offsets) EXPECT_EQ(z, static_cast<float>(w.spec.centre));
    }
    for (const char* dialect : {"mlx", "hqq"}) {
      const Transcoded t = transcode(w.view(), target(dialect, DType::kF32), serial_executor());
      expect_lossless(t, DType::kF32);
      TranscodeTarget home =
          target("gguf", DType::kF32, std::string(ggml_block(type).name).c_str());
      const std::string name(ggml_block(type).name);
      home.options.mode = name;
      expect_same_bytes(transcode(t.matrix.view(), home, serial_executor()).matrix, w, dialect);
    }
  }
}

TEST(Transcode, KQuantsMultiplyOutExactly) {
  const PackedMatrix w = blocks(GgmlType::kQ4_K, 3, 512, 16);
  const Transcoded t = transcode(w.view(), target("mlx", DType::kF32), serial_executor());
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(t.matrix.spec.group_size, 32);
  const GatheredStats flat = gather_stats(w.view());
  const auto to = transcoding::read_statistics(t.matrix.view());
  for (std::size_t g = 0; g < to.scales.size(); ++g) {
    EXPECT_EQ(to.scales[g], f16_to_f32(flat.supers[g / 8]) * static_cast<float>(flat.scales[g]));
    EXPECT_EQ(to.offsets[g],
              -(f16_to_f32(flat.super_offsets[g / 8]) * static_cast<float>(flat.offsets[g])));
  }
  for (const GgmlType type : {GgmlType::kQ5_K, GgmlType::kQ3_K, GgmlType::kQ6_K, GgmlType::kQ2_K}) {
    const PackedMatrix k = blocks(type, 2, 512, 17);
    SCOPED_TRACE(transcoding::form_name(k.spec));
    const bool shifted = k.spec.offset == Offset::kShift;
    const Transcoded into = transcode(
        k.view(), target(k.spec.bits == 5 ? "mlx" : "hqq", DType::kF32), serial_executor());
    EXPECT_TRUE(into.kept.codes);
    EXPECT_EQ(into.kept.lossless(), !shifted || k.spec.bits == 5);
  }
}

TEST(Transcode, FourBitFloatsAreHalfIntegers) {
  for (const char* mode : {"mxfp4", "nvfp4"}) {
    const PackedSpec spec =
        dialect_by_name("mlx").make_spec(4, 128, target("mlx", DType::kBF16, mode, 4).options);
    const PackedMatrix w = random_form(spec, Kind::kMixed, 18);
    const bool mx = std::string(mode) == "mxfp4";
    const Transcoded t =
        mx ? transcode(w.view(), target("mlx", DType::kF32, "affine", 5, 32), serial_executor())
           : transcode(w.view(), target("hqq", DType::kF32, "", 8), serial_executor());
    expect_lossless(t, DType::kF32);
    EXPECT_EQ(decode(t.matrix, DType::kBF16).bytes.size(), decode(w, DType::kBF16).bytes.size());
  }
}

TEST(Transcode, NonLinearBlocksFitEightBits) {
  const PackedMatrix w = blocks(GgmlType::kIQ4_NL, 4, 128, 19);
  const Transcoded t = transcode(w.view(), target("gguf", DType::kF32, "Q8_0"), serial_executor());
  EXPECT_EQ(ggml_type_of(t.matrix.spec), GgmlType::kQ8_0);
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(transcoding::read_statistics(t.matrix.view()).scales,
            transcoding::read_statistics(w.view()).scales);
}

// ------------------------------------------------------------------ bitsandbytes

PackedMatrix nf4(std::int64_t block, bool nested, DType dtype, std::uint64_t seed) {
  QuantizeOptions o;
  o.group_size = block;
  o.double_quant = nested;
  o.value_dtype = dtype;
  return random_form(dialect_by_name("bnb").make_spec(48, 512, o), Kind::kMixed, seed);
}

TEST(Transcode, SplittingNestedBlocksRepeatsBothLevels) {
  const PackedMatrix w = nf4(128, true, DType::kBF16, 20);
  TranscodeTarget to = target("bnb", DType::kBF16, "", 0, 64);
  to.options.double_quant = true;
  const Transcoded t = transcode(w.view(), to, serial_executor());
  expect_lossless(t, DType::kF32);
  const GatheredStats from = gather_stats(w.view()), is = gather_stats(t.matrix.view());
  ASSERT_EQ(is.scales.size(), 2 * from.scales.size());
  for (std::size_t g = 0; g < is.scales.size(); ++g) EXPECT_EQ(is.scales[g], from.scales[g / 2]);
  for (std::size_t b = 0; b < is.absmax2.size(); ++b) {
    EXPECT_EQ(is.absmax2[b], from.absmax2[b / 2]);
  }
  EXPECT_EQ(t.matrix.shared, w.shared);
  // Into plain absmax: what upstream computes when it reads.
  const Transcoded plain =
      transcode(w.view(), target("bnb", DType::kBF16, "", 0, 64), serial_executor());
  expect_lossless(plain, DType::kF32);
  // And back: equal neighbours merge.
  TranscodeTarget merge = target("bnb", DType::kBF16, "", 0, 128);
  const Transcoded merged = transcode(plain.matrix.view(), merge, serial_executor());
  expect_lossless(merged, DType::kF32);
  EXPECT_EQ(transcoding::read_statistics(merged.matrix.view()).scales,
            transcoding::read_statistics(w.view()).scales);
}

TEST(Transcode, StorageTypesAreViews) {
  const PackedMatrix w = nf4(64, true, DType::kBF16, 21);
  for (const char* storage : {"int8", "float16", "bfloat16", "float32", "uint8"}) {
    TranscodeTarget to = target("bnb", DType::kBF16, storage);
    to.options.double_quant = true;
    const Transcoded t = transcode(w.view(), to, serial_executor());
    expect_lossless(t, DType::kF32);
    EXPECT_EQ(t.matrix.codes, w.codes);
    EXPECT_EQ(t.matrix.stats, w.stats);
    const auto tensors = t.matrix.spec.dialect == 1
                             ? dialect_by_name("bnb").export_layer(t.matrix.view(), "")
                             : std::vector<NamedTensor>{};
    EXPECT_EQ(dtype_torch_name(tensor_named(tensors, "weight").dtype), storage);
    EXPECT_EQ(tensor_named(tensors, "weight").bytes,
              tensor_named(dialect_by_name("bnb").export_layer(w.view(), ""), "weight").bytes);
  }
}

TEST(Transcode, Nf4AndFp4AreOnlyLossy) {
  const PackedMatrix w = nf4(64, false, DType::kF32, 22);
  TranscodeTarget to = target("bnb", DType::kF32);
  to.options.quant_type = "fp4";
  const Preservation plan = plan_transcode(w.spec, to);
  EXPECT_FALSE(plan.codes);
  const Transcoded t = transcode(w.view(), to, serial_executor());
  EXPECT_EQ(t.matrix.spec.code_map, CodeMap::kFp4);
  EXPECT_GT(t.relative_error, 0.03);
  EXPECT_LT(t.relative_error, 0.25);
}

TEST(Transcode, StoredTablesAndShapesStay) {
  PackedSpec spec = nf4(64, false, DType::kF32, 23).spec;
  spec.code_map = CodeMap::kTable;
  spec.residue_bytes = 24;
  PackedMatrix w = random_form(spec, Kind::kMixed, 23);
  for (int i = 0; i < 16; ++i) {
    const float v = kNf4Codebook[static_cast<std::size_t>(i)] * 0.75F;
    std::memcpy(w.shared.data() + 4 * i, &v, 4);
  }
  const std::int64_t shape[3] = {6, 8, 512};
  std::memcpy(w.shared.data() + 64, shape, 24);
  const Transcoded t =
      transcode(w.view(), target("bnb", DType::kF32, "", 0, 32), serial_executor());
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(t.matrix.spec.code_map, CodeMap::kTable);
  EXPECT_EQ(t.matrix.shared, w.shared);
}

TEST(Transcode, RowwiseInt8BetweenBnbAndQuanto) {
  QuantizeOptions o = target("bnb", DType::kF32, "", 8).options;
  o.method = M::BNB_INT8;
  const PackedMatrix w = random_form(dialect_by_name("bnb").make_spec(40, 96, o), Kind::kMixed, 24);
  const Transcoded t = transcode(w.view(), target("quanto", DType::kF32), serial_executor());
  EXPECT_TRUE(t.kept.codes);
  EXPECT_LE(t.kept.statistics_ulp, 0.5);
  EXPECT_EQ(t.matrix.codes, w.codes);
  EXPECT_LT(t.relative_error, 0x1p-22);
  const Transcoded back = transcode(t.matrix.view(), target("bnb", DType::kF32), serial_executor());
  EXPECT_EQ(back.matrix.codes, w.codes);
  EXPECT_LT(back.relative_error, 0x1p-22);
}

// ------------------------------------------------------------------ mechanics

TEST(Transcode, SlicesAndThreadsDoNotMatter) {
  const PackedMatrix w = blocks(GgmlType::kQ4_1, 600, 4096, 25);  // more than one slice
  for (const TranscodeTarget& to : {target("mlx", DType::kF32), target("gguf", DType::kF32, "Q8_0"),
                                    target("bnb", DType::kF32)}) {
    const Transcoded serial = transcode(w.view(), to, serial_executor());
    expect_same_bytes(transcode(w.view(), to, OddExecutor()).matrix, serial.matrix, "odd");
    expect_same_bytes(transcode(w.view(), to, ThreadExecutor()).matrix, serial.matrix, "threads");
    // The first rows alone become the first rows of the result.
    PackedMatrix top = make_packed(ggml_spec(GgmlType::kQ4_1, 10, 4096));
    std::copy_n(w.codes.begin(), top.codes.size(), top.codes.begin());
    std::copy_n(w.stats.begin(), top.stats.size(), top.stats.begin());
    const Transcoded part = transcode(top.view(), to, serial_executor());
    EXPECT_TRUE(std::equal(part.matrix.codes.begin(), part.matrix.codes.end(),
                           serial.matrix.codes.begin()));
    EXPECT_TRUE(std::equal(part.matrix.stats.begin(), part.matrix.stats.end(),
                           serial.matrix.stats.begin()));
  }
}

TEST(Transcode, SlicesAreQuantizedLikeTheWhole) {
  const PackedMatrix w = blocks(GgmlType::kQ4_K, 300, 4096, 27);
  const Tensor dense = decode(w, DType::kF32);
  for (const char* name : {"bnb", "hqq", "gguf", "quanto"}) {
    SCOPED_TRACE(name);
    TranscodeTarget to =
        target(name, DType::kF32, std::string(name) == "gguf" ? "Q5_0" : "", 4, 64);
    to.options.method = std::string(name) == "bnb"      ? M::BNB_NF4
                        : std::string(name) == "hqq"    ? M::HQQ
                        : std::string(name) == "quanto" ? M::QUANTO_INT4
                                                        : M::NONE;
    to.options.quant_type = "nf4";
    to.options.optimize = false;
    to.options.round_zero = true;  // HQQ: not what the source has
    const Transcoded t = transcode(w.view(), to, OddExecutor());
    ASSERT_FALSE(t.kept.codes);
    expect_same_bytes(t.matrix, quantize(dense.view(), *to.dialect, to.options), name);
  }
}

TEST(Transcode, ColumnGroupsStayColumnGroups) {
  QuantizeOptions o = target("hqq", DType::kF32, "", 4, 64).options;
  o.method = M::HQQ;
  o.axis = 0;
  const PackedMatrix w = quantize(
      [] {
        Tensor t = make_tensor(DType::kF32, {64, 96});
        Random random(3);
        for (std::int64_t i = 0; i < 64 * 96; ++i) {
          const float v = random.uniform(-1, 1);
          std::memcpy(t.bytes.data() + 4 * i, &v, 4);
        }
        return t;
      }()
          .view(),
      o);
  TranscodeTarget to = target("hqq", DType::kF32, "", 4, 32);
  to.options.axis = 0;
  const Transcoded t = transcode(w.view(), to, serial_executor());
  expect_lossless(t, DType::kF32);
  EXPECT_EQ(t.matrix.spec.group_map, GroupMap::kColumnRuns);
  EXPECT_EQ(t.matrix.spec.group_size, 32);
  TranscodeTarget rows = target("mlx", DType::kF32, "", 4, 32);
  EXPECT_FALSE(transcode(w.view(), rows, serial_executor()).kept.codes);
}

TEST(Transcode, ImpossibleTargetsAreNamed) {
  const PackedMatrix w = nf4(64, false, DType::kF32, 26);
  expect_error(Errc::kConfig, {"no target dialect"},
               [&] { plan_transcode(w.spec, TranscodeTarget{}); });
  expect_error(Errc::kConfig, {"gguf", "Q9_9"},
               [&] { plan_transcode(w.spec, target("gguf", DType::kF32, "Q9_9")); });
  expect_error(Errc::kConfig, {"mlx", "group_size is 48"},
               [&] { plan_transcode(w.spec, target("mlx", DType::kF32, "", 4, 48)); });
  PackedView damaged = w.view();
  damaged.stats = damaged.stats.first(3);
  expect_error(Errc::kShape, {},
               [&] { transcode(damaged, target("mlx", DType::kF32), serial_executor()); });
}

TEST(Transcode, RoundOnceRoundsOnce) {
  // 1 + 2^-11 + 2^-30: float32 would round to the tie of binary16, once more to even.
  EXPECT_EQ(transcoding::round_once(DType::kF16, 1 + 0x1p-11 + 0x1p-30), 1.0F + 0x1p-10F);
  EXPECT_EQ(transcoding::round_once(DType::kF16, 1 + 0x1p-11), 1.0F);
  EXPECT_EQ(transcoding::round_once(DType::kBF16, 1 + 0x1p-8 + 0x1p-40), 1.0F + 0x1p-7F);
  EXPECT_EQ(transcoding::round_once(DType::kBF16, -(1 + 0x1p-8)), -1.0F);
  EXPECT_EQ(transcoding::round_once(DType::kF32, 1 + 0x1p-24), 1.0F);
  EXPECT_TRUE(std::isinf(transcoding::round_once(DType::kF16, 70000.0)));
}

}  // namespace
}  // namespace quantal::testing

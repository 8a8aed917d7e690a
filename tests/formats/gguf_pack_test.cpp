// Blocks in the packed form: inverse on bytes, the same values, and the dialect around it.
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "formats/layers.h"
#include "kernels/support.h"
#include "quantal/ggml.h"
#include "quantal/kernels.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

constexpr std::array<GgmlType, 11> kPackable = {GgmlType::kQ4_0, GgmlType::kQ4_1,  GgmlType::kQ5_0,
                                                GgmlType::kQ5_1, GgmlType::kQ8_0,  GgmlType::kQ2_K,
                                                GgmlType::kQ3_K, GgmlType::kQ4_K,  GgmlType::kQ5_K,
                                                GgmlType::kQ6_K, GgmlType::kIQ4_NL};

/// Places of the binary16 numbers in a block.
std::vector<std::size_t> half_places(GgmlType type) {
  switch (type) {
    case GgmlType::kQ4_1:
    case GgmlType::kQ5_1:
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K:
      return {0, 2};
    case GgmlType::kQ2_K:
      return {80, 82};
    case GgmlType::kQ3_K:
      return {108};
    case GgmlType::kQ6_K:
      return {208};
    default:
      return {0};
  }
}

/// Random bytes whose binary16 numbers are finite, so that values can be compared.
std::vector<std::uint8_t> random_blocks(GgmlType type, std::int64_t rows, std::int64_t cols) {
  const GgmlBlock& block = ggml_block(type);
  Random random(static_cast<std::uint64_t>(type) + 5);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(ggml_bytes(type, rows, cols)));
  for (std::uint8_t& byte : out) byte = static_cast<std::uint8_t>(random.next());
  for (std::size_t at = 0; at < out.size(); at += static_cast<std::size_t>(block.bytes)) {
    for (const std::size_t place : half_places(type)) out[at + place + 1] &= 0xBF;
  }
  return out;
}

TEST(GgufPack, InverseOnBytesAndEqualValues) {
  constexpr std::int64_t kRows = 13, kCols = 1280;
  for (const GgmlType type : kPackable) {
    SCOPED_TRACE(ggml_block(type).name);
    ASSERT_TRUE(ggml_packable(type));
    const auto blocks = random_blocks(type, kRows, kCols);
    const PackedMatrix w = pack_ggml(type, kRows, kCols, blocks, OddExecutor());
    EXPECT_EQ(w.spec, ggml_spec(type, kRows, kCols));
    EXPECT_EQ(ggml_type_of(w.spec), type);
    EXPECT_EQ(unpack_ggml(w.view(), OddExecutor()), blocks);

    std::vector<float> expected(kRows * kCols), actual(kRows * kCols);
    decode_ggml(type, blocks.data(), kRows * kCols, expected.data());
    for (const std::string_view set : available_cpu_kernels()) {
      select_cpu_kernels(set);
      dequantize(w.view(), {0, kRows, 0, kCols}, DType::kF32, actual.data(), kCols,
                 serial_executor());
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), expected.size() * 4), 0) << set;
    }
    select_cpu_kernels(available_cpu_kernels().front());
  }
}

TEST(GgufPack, GoldenBlocksKeepTheirValues) {
  const GoldenBook book("gguf_blocks");
  for (const auto& one : book.cases()) {
    const std::string name = one.at("type").get<std::string>();
    SCOPED_TRACE(name);
    const TensorView& raw = book.field(one, "raw");
    const TensorView& expected = book.field(one, "dequantized");
    const GgmlType type = find_ggml_block(std::string_view(name))->type;
    const std::int64_t cols = ggml_block(type).elements;
    const std::int64_t rows = expected.numel() / cols;
    const PackedMatrix w = pack_ggml(type, rows, cols, raw.bytes, serial_executor());
    EXPECT_EQ(unpack_ggml(w.view(), serial_executor()), bytes_of(raw));
    std::vector<float> actual(static_cast<std::size_t>(rows * cols));
    dequantize(w.view(), {0, rows, 0, cols}, DType::kF32, actual.data(), cols, serial_executor());
    EXPECT_EQ(std::memcmp(actual.data(), expected.bytes.data(), expected.bytes.size()), 0);
  }
}

TEST(GgufPack, Iq4NlUsesItsTable) {
  std::array<std::uint8_t, 18> block{};
  block[1] = 0x3C;  // d = 1
  for (std::size_t j = 0; j < 16; ++j) block[2 + j] = static_cast<std::uint8_t>(j | (15 - j) << 4);
  std::array<float, 32> out{};
  decode_ggml(GgmlType::kIQ4_NL, block.data(), 32, out.data());
  const std::array<float, 16> table = {-127, -104, -83, -65, -49, -35, -22, -10,
                                       1,    13,   25,  38,  53,  69,  89,  113};
  for (std::size_t j = 0; j < 16; ++j) {
    EXPECT_EQ(out[j], table[j]);
    EXPECT_EQ(out[j + 16], table[15 - j]);
  }
}

TEST(GgufPack, SpecsSayWhatTheFormatSays) {
  const PackedSpec q4 = ggml_spec(GgmlType::kQ4_0, 2, 64);
  EXPECT_EQ(q4.bits, 4);
  EXPECT_EQ(q4.centre, 8);
  EXPECT_EQ(q4.offset, Offset::kNone);
  EXPECT_EQ(q4.scale, ScaleSource::kF16);
  EXPECT_EQ(q4.group_size, 32);
  EXPECT_EQ(q4.value_dtype, DType::kF32);
  EXPECT_EQ(ggml_spec(GgmlType::kQ8_0, 2, 64).centre, 128);
  const PackedSpec q4k = ggml_spec(GgmlType::kQ4_K, 2, 512);
  EXPECT_EQ(q4k.scale, ScaleSource::kSuperU8);
  EXPECT_EQ(q4k.offset, Offset::kShift);
  EXPECT_EQ(q4k.nested_group_size, 8);
  EXPECT_EQ(ggml_spec(GgmlType::kQ6_K, 2, 512).centre, 32);
  // 4.5 bits per weight, as in the file.
  EXPECT_EQ(layout_of(q4).total_bytes(q4), ggml_bytes(GgmlType::kQ4_0, 2, 64));
}

TEST(GgufPack, RefusesByName) {
  const std::vector<std::uint8_t> blocks(18 * 4);
  expect_error(Errc::kUnsupported, {"F16", "no packed form"},
               [] { ggml_spec(GgmlType::kF16, 1, 32); });
  expect_error(Errc::kShape, {"multiple of 256"}, [] { ggml_spec(GgmlType::kQ4_K, 1, 320); });
  expect_error(Errc::kShape, {"Q4_0", "72", "90"},
               [&] { pack_ggml(GgmlType::kQ4_0, 5, 32, blocks, serial_executor()); });
  PackedMatrix w = pack_ggml(GgmlType::kQ4_0, 2, 64, blocks, serial_executor());
  w.spec.centre = 7;
  expect_error(Errc::kCorrupt, {"not that of a block type"},
               [&] { unpack_ggml(w.view(), serial_executor()); });
  w.spec.dialect = 2;
  expect_error(Errc::kUnsupported, {"dialect 2", "gguf"},
               [&] { unpack_ggml(w.view(), serial_executor()); });

  // Sub-scales have 8 bits in the packed form and 6 in the block.
  for (const GgmlType type : {GgmlType::kQ3_K, GgmlType::kQ4_K, GgmlType::kQ5_K}) {
    PackedMatrix k = pack_ggml(type, 2, 256, random_blocks(type, 2, 256), serial_executor());
    const PackedLayout layout = layout_of(k.spec);
    k.stats[static_cast<std::size_t>(layout.stat_bytes) + 3] = 64;
    expect_error(Errc::kCorrupt, {"row 1", "6 bits", std::string(ggml_block(type).name)},
                 [&] { unpack_ggml(k.view(), serial_executor()); });
  }
}

TEST(GgufDialect, QuantizesEveryModeAsTheEncoderDoes) {
  const Dialect& dialect = dialect_by_name("gguf");
  const Tensor mix = golden_input("mix", "f32");
  for (const char* mode :
       {"Q4_0", "q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "q5_k", "Q6_K", "IQ4_NL"}) {
    SCOPED_TRACE(mode);
    QuantizeOptions options;
    options.mode = mode;
    const PackedMatrix w = quantize(mix.view(), dialect, options, OddExecutor());
    const GgmlType type = find_ggml_block(std::string_view(mode))->type;
    EXPECT_EQ(ggml_type_of(w.spec), type);
    std::vector<std::uint8_t> blocks(
        static_cast<std::size_t>(ggml_bytes(type, mix.shape[0], mix.shape[1])));
    encode_ggml(type, DType::kF32, mix.bytes.data(), mix.shape[0], mix.shape[1], blocks.data(),
                serial_executor());
    const auto tensors = dialect.export_layer(w.view(), "a.b.");
    ASSERT_EQ(tensors.size(), 1u);
    EXPECT_EQ(tensors[0].name, "a.b.weight");
    EXPECT_EQ(tensors[0].tensor.dtype, DType::kU8);
    EXPECT_EQ(tensors[0].tensor.shape,
              (std::vector<std::int64_t>{mix.shape[0], ggml_bytes(type, 1, mix.shape[1])}));
    EXPECT_EQ(tensors[0].tensor.bytes, blocks);
  }
}

TEST(GgufDialect, OptionsAndRefusals) {
  const Dialect& dialect = dialect_by_name("gguf");
  const auto type_of_bits = [&](int bits) {
    QuantizeOptions options;
    options.bits = bits;
    return ggml_type_of(dialect.make_spec(4, 256, options));
  };
  EXPECT_EQ(type_of_bits(4), GgmlType::kQ4_0);
  EXPECT_EQ(type_of_bits(0), GgmlType::kQ4_0);
  EXPECT_EQ(type_of_bits(5), GgmlType::kQ5_0);
  EXPECT_EQ(type_of_bits(6), GgmlType::kQ6_K);
  EXPECT_EQ(type_of_bits(8), GgmlType::kQ8_0);
  expect_error(Errc::kConfig, {"bits is 3", "4, 5, 6, 8"}, [&] { type_of_bits(3); });
  QuantizeOptions options;
  for (const char* mode : {"Q2_K", "F16", "Q4_K_M", "nf4", "+"}) {
    options.mode = mode;
    expect_error(Errc::kConfig, {mode, "Q4_0", "IQ4_NL"},
                 [&] { dialect.make_spec(4, 256, options); });
  }
  options.mode = "Q4_K";
  expect_error(Errc::kShape, {"[4, 576]", "multiple of 256", "\"Q4_K+\" stores such rows as Q5_0"},
               [&] { dialect.make_spec(4, 576, options); });
  options.mode = "q4_k+";
  EXPECT_EQ(ggml_type_of(dialect.make_spec(4, 576, options)), GgmlType::kQ5_0);
  EXPECT_EQ(ggml_type_of(dialect.make_spec(4, 512, options)), GgmlType::kQ4_K);
  expect_error(Errc::kUnsupported, {"F16", "no packed form"},
               [&] { dialect.make_spec(4, 40, options); });
  EXPECT_FALSE(dialect.recognizes([](const std::string&) { return true; }));
  expect_error(Errc::kUnsupported, {"x.weight", ".gguf"},
               [&] { dialect.import_layer("x.", [](const std::string&) { return nullptr; }, {}); });
  EXPECT_EQ(dialect.reach(options), Reach::kRow);
}

}  // namespace
}  // namespace quantal::testing

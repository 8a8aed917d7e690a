// NF4 and FP4 against vectors written by bitsandbytes 0.50.2 on the CPU.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "formats/bnb/bnb_codec.h"
#include "formats/bnb/bnb_params.h"
#include "formats/layers.h"
#include "kernels/support.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

QuantizeOptions options_of(const nlohmann::json& c) {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_NF4;
  options.group_size = c.at("blocksize").get<std::int64_t>();
  options.quant_type = c.at("quant_type").get<std::string>();
  options.double_quant = c.at("nested").get<bool>();
  options.value_dtype = parse_dtype(c.at("dtype").get<std::string>());
  return options;
}

float first_float(std::span<const std::uint8_t> bytes) {
  float value = 0;
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

/// Distance in units in the last place of finite positive numbers.
std::int64_t ulps_apart(float a, float b) {
  return std::abs(static_cast<std::int64_t>(std::bit_cast<std::int32_t>(a)) -
                  std::bit_cast<std::int32_t>(b));
}

/// Values as float32 with -0 made +0: upstream's own decoders disagree on the sign of FP4 code 8.
std::vector<float> without_negative_zero(const Tensor& t) {
  std::vector<float> out(static_cast<std::size_t>(t.view().numel()));
  widen_to_f32(t.dtype, t.bytes.data(), t.view().numel(), out.data());
  for (float& x : out) x += 0.0F;
  return out;
}

/// Quantizes with the golden nested offset where there is one, so that all other bytes must agree.
PackedMatrix quantize_case(const GoldenBook& book, const nlohmann::json& c, const Tensor& input) {
  const std::int64_t cols = input.shape.back();
  const std::int64_t rows = input.view().numel() / cols;
  PackedMatrix w = make_packed(bnb::make_spec(rows, cols, options_of(c)));
  std::optional<float> offset;
  if (c.at("nested").get<bool>()) offset = first_float(book.field(c, "nested_offset").bytes);
  bnb::quantize_with_offset(w.spec, input.dtype, input.bytes.data(), offset, w.codes.data(),
                            w.stats.data(), w.shared.data(), serial_executor());
  return w;
}

TEST(BnbGolden, CodesStatisticsAndValues) {
  const GoldenBook book("bitsandbytes_4bit");
  ASSERT_EQ(book.cases().size(), 30u);
  for (const nlohmann::json& c : book.cases()) {
    SCOPED_TRACE(c.dump());
    const Tensor input =
        golden_input(c.at("input").get<std::string>(), c.at("dtype").get<std::string>());
    const PackedMatrix w = quantize_case(book, c, input);
    const auto tensors = dialect_of(QuantizationMethod::BNB_NF4).export_layer(w.view(), "");
    EXPECT_EQ(tensor_named(tensors, "weight").bytes, bytes_of(book.field(c, "packed")));
    EXPECT_EQ(tensor_named(tensors, "weight.absmax").bytes, bytes_of(book.field(c, "absmax")));
    EXPECT_EQ(tensor_named(tensors, "weight.absmax").shape, book.field(c, "absmax").shape);
    if (c.at("nested").get<bool>()) {
      EXPECT_EQ(tensor_named(tensors, "weight.nested_absmax").bytes,
                bytes_of(book.field(c, "nested_absmax")));
    }
    if (c.at("tensors").contains("dequantized")) {
      const TensorView& golden = book.field(c, "dequantized");
      EXPECT_EQ(without_negative_zero(decode(w, w.spec.value_dtype)),
                without_negative_zero({golden.dtype, golden.shape, bytes_of(golden)}));
    }
  }
}

TEST(BnbGolden, OwnNestedOffsetIsWithinOneUlp) {
  const GoldenBook book("bitsandbytes_4bit");
  int nested = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!c.at("nested").get<bool>()) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input =
        golden_input(c.at("input").get<std::string>(), c.at("dtype").get<std::string>());
    const PackedMatrix w = quantize(input.view(), options_of(c));
    EXPECT_LE(ulps_apart(first_float(w.shared), first_float(book.field(c, "nested_offset").bytes)),
              1);
    ++nested;
  }
  EXPECT_EQ(nested, 6);
}

TEST(BnbGolden, StorageViewsImportToTheSameLayer) {
  const GoldenBook book("bitsandbytes_4bit");
  const Dialect& dialect = dialect_of(QuantizationMethod::BNB_NF4);
  int views = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!c.contains("quant_storage")) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input("mix", "f32");
    const PackedMatrix w = quantize_case(book, c, input);
    TensorMap map(dialect.export_layer(w.view(), ""));
    const TensorView& stored = book.field(c, "packed");
    map.set("weight", {stored.dtype, stored.shape, bytes_of(stored)});
    const PackedMatrix back = dialect.import_layer("", map.lookup(), {});
    EXPECT_EQ(back.codes, w.codes);
    const auto exported = dialect.export_layer(back.view(), "");
    EXPECT_EQ(tensor_named(exported, "weight").dtype, stored.dtype);
    EXPECT_EQ(tensor_named(exported, "weight").shape, stored.shape);
    EXPECT_EQ(tensor_named(exported, "weight").bytes, bytes_of(stored));
    ++views;
  }
  EXPECT_EQ(views, 4);
}

TEST(BnbGolden, Codebooks) {
  const SafetensorsFile file(golden_path("vectors/bitsandbytes_codebooks.safetensors"));
  const auto same = [&](const char* name, const float* values, std::size_t n) {
    ASSERT_EQ(file.find(name)->bytes.size(), n * sizeof(float)) << name;
    EXPECT_EQ(std::memcmp(file.find(name)->bytes.data(), values, n * sizeof(float)), 0) << name;
  };
  same("nf4", kNf4Codebook.data(), 16);
  same("fp4", kFp4Codebook.data(), 16);
  same("dynamic_signed", bnb::dynamic_map().data(), 256);
}

TEST(BnbGolden, DynamicEightBitBlocks) {
  const GoldenBook book("bitsandbytes_8bit");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (c.at("kind") != "blockwise dynamic 8-bit") continue;
    SCOPED_TRACE(c.dump());
    const TensorView& input = book.field(c, "input");
    const auto n = static_cast<std::size_t>(input.numel());
    const bnb::Nested nested = bnb::quantize_dynamic({input.data<float>(), n}, 0.0F, OddExecutor());
    EXPECT_TRUE(std::ranges::equal(nested.codes, bytes_of(book.field(c, "codes"))));
    const TensorView& absmax = book.field(c, "absmax");
    ASSERT_EQ(absmax.bytes.size(), nested.absmax.size() * sizeof(float));
    EXPECT_EQ(std::memcmp(absmax.bytes.data(), nested.absmax.data(), absmax.bytes.size()), 0);
    ++cases;
  }
  EXPECT_EQ(cases, 4);
}

}  // namespace
}  // namespace quantal::testing

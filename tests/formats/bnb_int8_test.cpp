// LLM.int8: weights against vectors written by bitsandbytes 0.50.2 on the CPU, instruction sets
// against the scalar truth, layers in a state dict.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "formats/bnb/bnb_params.h"
#include "formats/layers.h"
#include "kernels/row_int8.h"
#include "kernels/support.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

QuantizeOptions int8_options() {
  QuantizeOptions options;
  options.method = QuantizationMethod::BNB_INT8;
  options.bits = 8;
  return options;
}

const Dialect& bnb_dialect() { return dialect_of(QuantizationMethod::BNB_INT8); }

Tensor matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (float& v : values) {
    v = (random.uniform(-1, 1) + random.uniform(-1, 1)) * 0.05F;
    if (random.below(300) == 0) v *= 50;
    if (random.below(300) == 0) v *= 1e-7F;  // subnormal binary16
  }
  Tensor out = make_tensor(dtype, {rows, cols});
  narrow_from_f32(dtype, values.data(), rows * cols, out.bytes.data());
  return out;
}

Tensor row_tensor(const std::vector<float>& values) {
  Tensor t = make_tensor(DType::kF32, {1, static_cast<std::int64_t>(values.size())});
  std::memcpy(t.bytes.data(), values.data(), t.bytes.size());
  return t;
}

TEST(BnbInt8, GoldenCodesStatisticsAndValues) {
  const GoldenBook book("bitsandbytes_8bit");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (c.at("kind") != "LLM.int8 weight") continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    for (const std::string_view set : available_cpu_kernels()) {
      select_cpu_kernels(set);
      const PackedMatrix w = quantize(input.view(), int8_options());
      const auto tensors = bnb_dialect().export_layer(w.view(), "");
      EXPECT_EQ(tensor_named(tensors, "weight").bytes, bytes_of(book.field(c, "CB"))) << set;
      EXPECT_EQ(tensor_named(tensors, "SCB").bytes, bytes_of(book.field(c, "SCB"))) << set;
      EXPECT_EQ(decode(w, DType::kF32).bytes, bytes_of(book.field(c, "dequantized"))) << set;
    }
    ++cases;
  }
  EXPECT_EQ(cases, 3);
  select_cpu_kernels(available_cpu_kernels().front());
}

TEST(BnbInt8, WeightsOfTheGoldenProducts) {
  const GoldenBook book("bitsandbytes_8bit");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (c.at("kind") != "LLM.int8 matmul") continue;
    const auto tensors =
        bnb_dialect().export_layer(quantize(book.field(c, "weight"), int8_options()).view(), "");
    EXPECT_EQ(tensor_named(tensors, "weight").bytes, bytes_of(book.field(c, "CB")));
    EXPECT_EQ(tensor_named(tensors, "SCB").bytes, bytes_of(book.field(c, "SCB")));
    ++cases;
  }
  EXPECT_EQ(cases, 2);
}

TEST(BnbInt8, EverySetEncodesAsTheScalarTruth) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const std::int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 100}) {
      const Tensor w = matrix(1, n, dtype, static_cast<std::uint64_t>(n));
      for (const float factor : {1.0F, 46.18F, 1.25F, 46.0F}) {
        std::vector<std::uint8_t> truth(static_cast<std::size_t>(n)), got(truth.size());
        encode_row_int8_scalar({dtype, w.bytes.data()}, n, factor, truth.data());
        for (const std::string_view set : available_cpu_kernels()) {
          select_cpu_kernels(set);
          std::fill(got.begin(), got.end(), std::uint8_t{0});
          row_int8_encoder()({dtype, w.bytes.data()}, n, factor, got.data());
          EXPECT_EQ(got, truth) << set << " n " << n << " " << dtype_name(dtype);
        }
      }
    }
  }
  select_cpu_kernels(available_cpu_kernels().front());
}

TEST(BnbInt8, EverySetRoundsToBinary16AsTheScalarTruth) {
  // Every finite binary16 number, and what lies half a step and a little less or more beside it.
  std::vector<float> values;
  for (std::uint32_t h = 0; h < 0x7C00; ++h) {
    float low = 0, high = 0;
    const auto a = static_cast<std::uint16_t>(h), b = static_cast<std::uint16_t>(h + 1);
    widen_to_f32(DType::kF16, &a, 1, &low);
    widen_to_f32(DType::kF16, &b, 1, &high);
    if (!std::isfinite(high)) continue;
    const float middle = (low + high) / 2;
    values.insert(values.end(), {low, middle, std::nextafterf(middle, low),
                                 std::nextafterf(middle, high), -middle});
  }
  const auto n = static_cast<std::int64_t>(values.size());
  const WeightRun run{DType::kF32, values.data()};
  std::vector<std::uint8_t> truth(values.size()), got(values.size());
  // Factors that make the last bit of large numbers, and of subnormal ones, count.
  for (const float factor : {127.0F / 65504.0F, 1.9F}) {
    encode_row_int8_scalar(run, n, factor, truth.data());
    for (const std::string_view set : available_cpu_kernels()) {
      select_cpu_kernels(set);
      row_int8_encoder()(run, n, factor, got.data());
      EXPECT_EQ(got, truth) << set;
    }
  }
  for (float& v : values) v = std::fabs(v) < 0x1p-14F ? v : 0.0F;  // subnormals: factor 2^20
  encode_row_int8_scalar(run, n, 0x1p20F, truth.data());
  for (const std::string_view set : available_cpu_kernels()) {
    select_cpu_kernels(set);
    row_int8_encoder()(run, n, 0x1p20F, got.data());
    EXPECT_EQ(got, truth) << set;
  }
  select_cpu_kernels(available_cpu_kernels().front());
}

TEST(BnbInt8, SameBytesForEverySplitAndInstructionSet) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const auto& [rows, cols] : {std::pair{65, 96}, std::pair{7, 129}, std::pair{1, 1}}) {
      const Tensor w = matrix(rows, cols, dtype, 3);
      select_cpu_kernels("scalar");
      const PackedMatrix truth = quantize(w.view(), int8_options());
      for (const std::string_view set : available_cpu_kernels()) {
        select_cpu_kernels(set);
        expect_same_bytes(quantize(w.view(), int8_options()), truth, std::string(set));
        expect_same_bytes(quantize(w.view(), int8_options(), OddExecutor()), truth, "odd");
        expect_same_bytes(quantize(w.view(), int8_options(), ThreadExecutor()), truth, "threads");
      }
    }
  }
}

TEST(BnbInt8, WorkedExample) {
  // SCB 2; factor (1/2) * 127 = 63.5; 0.5 * 63.5 = 31.75 -> 32; -0.0236 rounds to binary16 first.
  const PackedMatrix w = quantize(row_tensor({2.0F, 0.5F, -1.0F, 0.0F}).view(), int8_options());
  const auto tensors = bnb_dialect().export_layer(w.view(), "");
  EXPECT_EQ(tensor_named(tensors, "weight").bytes,
            (std::vector<std::uint8_t>{127, 32, static_cast<std::uint8_t>(-64), 0}));
  const Tensor values = decode(w, DType::kF32);
  EXPECT_EQ(values.view().data<float>()[1], (32.0F * 2.0F) * kInverse127);
}

TEST(BnbInt8, ZeroRowsAndBadWeights) {
  const PackedMatrix zero = quantize(row_tensor({0.0F, -0.0F, 1e-9F}).view(), int8_options());
  EXPECT_EQ(decode(zero, DType::kF32).bytes, std::vector<std::uint8_t>(12, 0));
  expect_error(Errc::kUnsupported, {"row 0", "column 1", "is nan"}, [] {
    quantize(row_tensor({1.0F, NAN}).view(), int8_options());
  });
  expect_error(Errc::kUnsupported, {"row 0", "column 0", "is -inf"}, [] {
    quantize(row_tensor({-HUGE_VALF, 1.0F}).view(), int8_options());
  });
  expect_error(Errc::kUnsupported, {"row 0", "column 2", "70000", "65504", "float16"}, [] {
    quantize(row_tensor({1.0F, 65504.0F, 70000.0F}).view(), int8_options());
  });
  QuantizeOptions four = int8_options();
  four.bits = 4;
  expect_error(Errc::kConfig, {"bits is 4", "expected 8"},
               [&] { quantize(row_tensor({1.0F}).view(), four); });
}

// ------------------------------------------------------------------ state dict

TensorMap int8_layer() {
  const PackedMatrix w = quantize(matrix(5, 33, DType::kF16, 9).view(), int8_options());
  return TensorMap(bnb_dialect().export_layer(w.view(), "l."));
}

TEST(BnbInt8, ExportAndImportAreInverse) {
  const PackedMatrix w = quantize(matrix(5, 33, DType::kF16, 9).view(), int8_options());
  TensorMap map = int8_layer();
  EXPECT_EQ(map.at("l.weight").shape, (std::vector<std::int64_t>{5, 33}));
  EXPECT_EQ(map.at("l.weight").dtype, DType::kI8);
  EXPECT_TRUE(map.at("l.weight_format").shape.empty());
  expect_same_bytes(bnb_dialect().import_layer("l.", map.lookup(), {}), w, "import");
  // The one int8 that no quantizer writes.
  map.at("l.weight").bytes[7] = 0x80;
  const auto again =
      bnb_dialect().export_layer(bnb_dialect().import_layer("l.", map.lookup(), {}).view(), "l.");
  EXPECT_EQ(tensor_named(again, "l.weight").bytes, map.at("l.weight").bytes);
}

TEST(BnbInt8, WeightFormatMayBeAbsentOrText) {
  TensorMap map = int8_layer();
  map.erase("l.weight_format");
  const PackedMatrix w = bnb_dialect().import_layer("l.", map.lookup(), {});
  EXPECT_EQ(bnb_dialect().export_layer(w.view(), "l.").size(), 2u);
  map.set("l.weight_format", {DType::kU8, {3}, {'r', 'o', 'w'}});
  EXPECT_EQ(bnb_dialect().import_layer("l.", map.lookup(), {}).codes, w.codes);
}

TEST(BnbInt8, HistoricFormatsAreRefusedByName) {
  TensorMap map = int8_layer();
  const char* names[] = {"row", "col32", "col_turing", "col_ampere"};
  for (std::uint8_t format = 1; format < 4; ++format) {
    map.at("l.weight_format").bytes[0] = format;
    expect_error(Errc::kUnsupported, {"weight_format is " + std::string(names[format]), "row"},
                 [&] { bnb_dialect().import_layer("l.", map.lookup(), {}); });
  }
  map.at("l.weight_format").bytes[0] = 4;
  expect_error(Errc::kCorrupt, {"weight_format", "expected row"},
               [&] { bnb_dialect().import_layer("l.", map.lookup(), {}); });
}

TEST(BnbInt8, DamagedTensorsAreNamed) {
  const auto refused = [](Errc code, const std::vector<std::string>& parts, auto damage) {
    TensorMap map = int8_layer();
    damage(map);
    expect_error(code, parts, [&] { bnb_dialect().import_layer("l.", map.lookup(), {}); });
  };
  refused(Errc::kCorrupt, {"l.weight is missing"}, [](TensorMap& m) { m.erase("l.weight"); });
  refused(Errc::kDtype, {"l.weight", "u8"},
          [](TensorMap& m) { m.at("l.weight").dtype = DType::kU8; });
  refused(Errc::kDtype, {"l.SCB", "i32"}, [](TensorMap& m) { m.at("l.SCB").dtype = DType::kI32; });
  refused(Errc::kShape, {"l.SCB", "expected 5"},
          [](TensorMap& m) { m.set("l.SCB", make_tensor(DType::kF32, {4})); });
  refused(Errc::kCorrupt, {"l.weight", "bytes"},
          [](TensorMap& m) { m.at("l.weight").bytes.pop_back(); });
  refused(Errc::kShape, {"l.weight", "2 dimensions"},
          [](TensorMap& m) { m.at("l.weight").shape = {5 * 33}; });
}

TEST(BnbInt8, ThresholdOfTheSettingsStaysWithTheLayer) {
  TensorMap map = int8_layer();
  LayerFacts facts;
  const PackedMatrix plain = bnb_dialect().import_layer("l.", map.lookup(), facts);
  EXPECT_EQ(bnb::Flags::from_int(plain.spec.dialect_flags).threshold, 6.0F);
  EXPECT_EQ(plain.spec.dialect_flags, 0);
  facts.settings = R"({"llm_int8_threshold": 3.5})";
  const PackedMatrix w = bnb_dialect().import_layer("l.", map.lookup(), facts);
  EXPECT_EQ(bnb::Flags::from_int(w.spec.dialect_flags).threshold, 3.5F);
  EXPECT_EQ(spec_from_ints(spec_to_ints(w.spec)), w.spec);
}

}  // namespace
}  // namespace quantal::testing

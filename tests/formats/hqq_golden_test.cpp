// HQQ at 8 and 4 bits against vectors written by hqq 0.2.8.post1 on the CPU.
#include <gtest/gtest.h>

#include <cmath>

#include "formats/hqq/hqq_codec.h"
#include "formats/layers.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

bool eight_or_four(const nlohmann::json& c) { return c.at("nbits") == 8 || c.at("nbits") == 4; }

QuantizeOptions options_of(const nlohmann::json& c, const Tensor& input) {
  QuantizeOptions options;
  options.method = QuantizationMethod::HQQ;
  options.bits = c.at("nbits").get<int>();
  options.group_size = c.at("group_size").is_null() ? 0 : c.at("group_size").get<std::int64_t>();
  // One scale for the whole matrix is one group of all weights.
  if (!c.at("channel_wise").get<bool>()) options.group_size = input.view().numel();
  options.axis = c.at("axis").get<int>();
  options.optimize = c.at("optimize").get<bool>() && c.at("channel_wise").get<bool>();
  options.round_zero = c.at("round_zero").get<bool>();
  options.value_dtype = parse_dtype(c.at("compute_dtype").get<std::string>());
  return options;
}

/// One code per byte of the stored W_q, in flat order of the grouped matrix.
std::vector<int> codes_of(std::span<const std::uint8_t> packed, int bits) {
  std::vector<int> out(packed.begin(), packed.end());
  if (bits == 8) return out;
  for (int& byte : out) byte >>= 4;
  for (const std::uint8_t byte : packed) out.push_back(byte & 15);
  return out;
}

double squared_error(const Tensor& decoded, const Tensor& input) {
  double sum = 0;
  std::vector<float> values(static_cast<std::size_t>(decoded.view().numel()));
  widen_to_f32(decoded.dtype, decoded.bytes.data(), decoded.view().numel(), values.data());
  const float* w = input.view().data<float>();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double d = static_cast<double>(values[i]) - static_cast<double>(w[i]);
    sum += d * d;
  }
  return sum;
}

/// Imports the golden tensors of a case as a layer.
PackedMatrix import_case(const GoldenBook& book, const nlohmann::json& c, const PackedMatrix& own) {
  const Dialect& dialect = dialect_of(QuantizationMethod::HQQ);
  TensorMap map(dialect.export_layer(own.view(), ""));
  for (const char* field : {"W_q", "scale", "zero"}) {
    const TensorView& t = book.field(c, field);
    map.set(field, {t.dtype, t.shape, bytes_of(t)});
  }
  if (!c.at("channel_wise").get<bool>()) {
    map.at("channel_wise").bytes[0] = 0;
    map.at("group_size").bytes = {static_cast<std::uint8_t>(own.spec.cols), 0, 0, 0};
  }
  map.at("view_as_float").bytes[0] = c.at("view_as_float").get<bool>() ? 1 : 0;
  return dialect.import_layer("", map.lookup(), {});
}

TEST(HqqGolden, WithoutSolverBitForBit) {
  const GoldenBook book("hqq");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!eight_or_four(c)) continue;
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    const QuantizeOptions options = options_of(c, input);
    if (options.optimize) continue;
    SCOPED_TRACE(c.dump());
    const PackedMatrix w = quantize(input.view(), options);
    const auto tensors = dialect_of(QuantizationMethod::HQQ).export_layer(w.view(), "");
    for (const char* field : {"W_q", "scale", "zero"}) {
      const TensorView& golden = book.field(c, field);
      EXPECT_EQ(tensor_named(tensors, field).dtype, golden.dtype) << field;
      EXPECT_EQ(tensor_named(tensors, field).bytes, bytes_of(golden)) << field;
      if (c.at("channel_wise").get<bool>()) {
        EXPECT_EQ(tensor_named(tensors, field).shape, golden.shape) << field;
      }
    }
    EXPECT_EQ(decode(w, w.spec.value_dtype).bytes, bytes_of(book.field(c, "dequantized")));
    ++cases;
  }
  EXPECT_EQ(cases, 5);
}

TEST(HqqGolden, WithSolverUpToSummationOrder) {
  const GoldenBook book("hqq");
  int cases = 0;
  std::int64_t total = 0, differing = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!eight_or_four(c)) continue;
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    const QuantizeOptions options = options_of(c, input);
    if (!options.optimize) continue;
    SCOPED_TRACE(c.dump());
    const PackedMatrix w = quantize(input.view(), options);
    const PackedMatrix golden = import_case(book, c, w);
    const auto own = dialect_of(QuantizationMethod::HQQ).export_layer(w.view(), "");
    EXPECT_EQ(tensor_named(own, "scale").bytes, bytes_of(book.field(c, "scale")));
    const std::vector<int> a = codes_of(tensor_named(own, "W_q").bytes, options.bits);
    const std::vector<int> b = codes_of(book.field(c, "W_q").bytes, options.bits);
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_LE(std::abs(a[i] - b[i]), 1) << "code " << i;
      differing += a[i] != b[i];
    }
    total += static_cast<std::int64_t>(a.size());
    const double theirs = squared_error(decode(golden, golden.spec.value_dtype), input);
    const double ours = squared_error(decode(w, w.spec.value_dtype), input);
    EXPECT_LE(ours, theirs * 1.001);
    ++cases;
  }
  EXPECT_EQ(cases, 12);
  EXPECT_LE(differing * 20000, total) << differing << " of " << total << " codes differ";
}

TEST(HqqGolden, ImportsAndReexportsEveryCase) {
  const GoldenBook book("hqq");
  const Dialect& dialect = dialect_of(QuantizationMethod::HQQ);
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!eight_or_four(c)) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    const PackedMatrix golden = import_case(book, c, quantize(input.view(), options_of(c, input)));
    EXPECT_EQ(decode(golden, golden.spec.value_dtype).bytes,
              bytes_of(book.field(c, "dequantized")));
    const auto tensors = dialect.export_layer(golden.view(), "");
    EXPECT_EQ(tensor_named(tensors, "W_q").bytes, bytes_of(book.field(c, "W_q")));
    EXPECT_EQ(tensor_named(tensors, "W_q").shape, book.field(c, "W_q").shape);
    EXPECT_EQ(tensor_named(tensors, "zero").bytes, bytes_of(book.field(c, "zero")));
    ++cases;
  }
  EXPECT_EQ(cases, 17);
}

TEST(HqqGolden, ErrorFallsUntilTheSolverStops) {
  const Tensor input = golden_input("mix", "f32");
  QuantizeOptions options;
  options.method = QuantizationMethod::HQQ;
  const PackedSpec spec = hqq::make_spec(40, 256, options);
  const hqq::GroupParameters p =
      hqq::solve(spec, {DType::kF32, input.bytes.data()}, serial_executor());
  ASSERT_GE(p.errors.size(), 2u);
  ASSERT_LE(p.errors.size(), 20u);
  for (std::size_t i = 1; i + 1 < p.errors.size(); ++i) EXPECT_LT(p.errors[i], p.errors[i - 1]);
}

}  // namespace
}  // namespace quantal::testing

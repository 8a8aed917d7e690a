// qint2, qint4, qint8 and float8 against vectors written by optimum-quanto 0.2.7 on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "formats/layers.h"
#include "formats/quanto/quanto_codec.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

const std::string& text(const nlohmann::json& c, const char* key) {
  return c.at(key).get_ref<const std::string&>();
}

bool is_float8(const nlohmann::json& c) { return text(c, "qtype").starts_with("qfloat8"); }
bool is_int8(const nlohmann::json& c) { return text(c, "qtype") == "qint8"; }
bool is_hqq(const nlohmann::json& c) { return text(c, "optimizer") == "HqqOptimizer"; }

QuantizeOptions options_of(const nlohmann::json& c) {
  QuantizeOptions options;
  options.method = parse_method("quanto_" + text(c, "qtype").substr(1));
  options.axis = c.at("axis").get<int>();
  options.value_dtype = parse_dtype(text(c, "dtype"));
  if (is_int8(c)) return options;
  options.group_size = c.at("group_size").is_null() ? 0 : c.at("group_size").get<std::int64_t>();
  options.mode = is_hqq(c) ? "hqq,exact_group" : "exact_group";
  if (c.at("zeropoint").get<bool>()) options.mode += ",zeropoint";
  return options;
}

std::vector<std::string> fields_of(const nlohmann::json& c) {
  std::vector<std::string> fields;
  for (const auto& [field, name] : c.at("tensors").items()) {
    if (field != "dequantized") fields.push_back(field);
  }
  return fields;
}

std::string upstream_name(const nlohmann::json& c, const std::string& field) {
  const bool packed = field == "_data" && !is_int8(c) && !is_float8(c);
  return "weight." + field + (packed ? "._data" : "");
}

/// The golden tensors of a case as a layer, without activation scales.
PackedMatrix import_case(const GoldenBook& book, const nlohmann::json& c,
                         const std::vector<std::int64_t>& shape) {
  TensorMap map;
  for (const std::string& field : fields_of(c)) {
    const TensorView& t = book.field(c, field);
    map.set(upstream_name(c, field), {t.dtype, t.shape, bytes_of(t)});
  }
  return dialect_by_name("quanto").import_layer("", map.lookup(), {.weight_shape = shape});
}

/// Bytes with every -0 of a float tensor made +0.
std::vector<std::uint8_t> without_signs_of_zeros(const TensorView& t) {
  std::vector<std::uint8_t> out = bytes_of(t);
  if (!is_weight_dtype(t.dtype)) return out;
  const std::size_t item = dtype_size(t.dtype);
  for (std::size_t i = 0; i + item <= out.size(); i += item) {
    const bool zero = std::all_of(out.begin() + static_cast<std::ptrdiff_t>(i),
                                  out.begin() + static_cast<std::ptrdiff_t>(i + item - 1),
                                  [](std::uint8_t b) { return b == 0; }) &&
                      out[i + item - 1] == 0x80;
    if (zero) out[i + item - 1] = 0;
  }
  return out;
}

enum class Zeros { kExact, kEitherSign };

// The smallest weight of a group that holds +0 and -0 is either, depending on the vector width that
// torch uses: a shift of 0 may have the other sign after quantizing (never after reading).
void expect_tensors(const GoldenBook& book, const nlohmann::json& c,
                    const std::vector<NamedTensor>& tensors, Zeros zeros) {
  for (const std::string& field : fields_of(c)) {
    const Tensor& ours = tensor_named(tensors, upstream_name(c, field));
    const TensorView& golden = book.field(c, field);
    EXPECT_EQ(ours.dtype, golden.dtype) << field;
    EXPECT_EQ(ours.shape, golden.shape) << field;
    if (zeros == Zeros::kExact) {
      EXPECT_EQ(ours.bytes, bytes_of(golden)) << field;
    } else {
      EXPECT_EQ(without_signs_of_zeros(ours.view()), without_signs_of_zeros(golden)) << field;
    }
  }
}

std::vector<float> as_floats(const TensorView& t) {
  std::vector<float> out(static_cast<std::size_t>(t.numel()));
  widen_to_f32(t.dtype, t.bytes.data(), t.numel(), out.data());
  return out;
}

TEST(QuantoGolden, DefaultOptimizersBitForBit) {
  const GoldenBook book("quanto");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (is_float8(c) || is_hqq(c)) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(text(c, "input"), text(c, "dtype"));
    const PackedMatrix w = quantize(input.view(), options_of(c));
    expect_tensors(book, c, dialect_by_name("quanto").export_layer(w.view(), ""),
                   Zeros::kEitherSign);
    EXPECT_EQ(decode(w, w.spec.value_dtype).bytes, bytes_of(book.field(c, "dequantized")));
    ++cases;
  }
  EXPECT_EQ(cases, 29);
}

TEST(QuantoGolden, WeightsAreRoundedToTheValueTypeFirst) {
  const GoldenBook book("quanto");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (is_float8(c) || is_hqq(c) || text(c, "dtype") == "f32") continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(text(c, "input"), "f32");
    const PackedMatrix w = quantize(input.view(), options_of(c));
    expect_tensors(book, c, dialect_by_name("quanto").export_layer(w.view(), ""),
                   Zeros::kEitherSign);
    ++cases;
  }
  EXPECT_EQ(cases, 6);
}

// The mean over the matrix and the means of the groups are float32 sums of torch upstream.
TEST(QuantoGolden, HqqOptimizerUpToSummationOrder) {
  const GoldenBook book("quanto");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!is_hqq(c)) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(text(c, "input"), text(c, "dtype"));
    const PackedMatrix w = quantize(input.view(), options_of(c));
    const auto ours = dialect_by_name("quanto").export_layer(w.view(), "");
    EXPECT_EQ(tensor_named(ours, "weight._scale").bytes, bytes_of(book.field(c, "_scale")));
    EXPECT_EQ(tensor_named(ours, "weight._data._data").bytes, bytes_of(book.field(c, "_data")));
    const std::vector<float> a = as_floats(tensor_named(ours, "weight._shift").view());
    const std::vector<float> b = as_floats(book.field(c, "_shift"));
    const float step = text(c, "dtype") == "f32" ? 0x1p-21F : 0.0F;
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_LE(std::fabs(a[i] - b[i]), step * std::fabs(b[i]) + step * 1e-3F) << "shift " << i;
    }
    ++cases;
  }
  EXPECT_EQ(cases, 4);
}

TEST(QuantoGolden, ImportsAndReexportsEveryCase) {
  const GoldenBook book("quanto");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(text(c, "input"), "f32");
    const PackedMatrix w = import_case(book, c, input.shape);
    const auto tensors = dialect_by_name("quanto").export_layer(w.view(), "");
    EXPECT_EQ(tensors.size(), fields_of(c).size());
    expect_tensors(book, c, tensors, Zeros::kExact);
    if (!is_float8(c)) {
      EXPECT_EQ(decode(w, w.spec.value_dtype).bytes, bytes_of(book.field(c, "dequantized")));
    }
    ++cases;
  }
  EXPECT_EQ(cases, 41);
}

// Upstream stores 0 / 0 converted to float8, so that rows of zeros decode to NaN there.
TEST(QuantoGolden, Float8RowsOfZerosAreZeroHere) {
  const GoldenBook book("quanto");
  int cases = 0, repaired = 0;
  for (const nlohmann::json& c : book.cases()) {
    if (!is_float8(c)) continue;
    SCOPED_TRACE(c.dump());
    const Tensor input = golden_input(text(c, "input"), "f32");
    const PackedMatrix w = import_case(book, c, input.shape);
    const std::vector<float> ours = as_floats(decode(w, w.spec.value_dtype).view());
    const std::vector<float> theirs = as_floats(book.field(c, "dequantized"));
    for (std::size_t i = 0; i < ours.size(); ++i) {
      if (!std::isnan(theirs[i])) {
        ASSERT_EQ(ours[i], theirs[i]) << i;
        continue;
      }
      ASSERT_EQ(ours[i], 0.0F) << i;
      ++repaired;
    }
    ++cases;
  }
  EXPECT_EQ(cases, 8);
  EXPECT_GT(repaired, 0);
}

}  // namespace
}  // namespace quantal::testing

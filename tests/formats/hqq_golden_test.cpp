// HQQ at every width against vectors written by hqq 0.2.8.post1 on the CPU.
#include <gtest/gtest.h>

#include <cmath>

#include "formats/hqq/hqq_codec.h"
#include "formats/hqq/hqq_meta.h"
#include "formats/layers.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

const Dialect& hqq_dialect() { return dialect_of(QuantizationMethod::HQQ); }

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

/// Tensors of a case as upstream's layer dictionary.
TensorMap layer_of(const GoldenBook& book, const nlohmann::json& c) {
  const std::vector<std::int64_t> shape = c.at("shape").get<std::vector<std::int64_t>>();
  TensorMap map;
  const auto set = [&](const NamedTensor& t) { map.set(t.name, t.tensor); };
  for (const char* field : {"W_q", "scale", "zero"}) {
    const TensorView& t = book.field(c, field);
    map.set(field, {t.dtype, t.shape, bytes_of(t)});
  }
  const int bits = c.at("nbits").get<int>();
  set(hqq::named_int("nbits", bits));
  if (!c.at("group_size").is_null()) {
    set(hqq::named_int("group_size", c.at("group_size").get<std::int64_t>()));
  }
  set(hqq::named_size("shape", shape));
  set(hqq::named_int("axis", c.at("axis").get<int>()));
  set(hqq::named_text("packing", c.at("packing").get<std::string>()));
  set(hqq::named_dtype("unpack_view_dtype", bits == 3 ? DType::kI32 : DType::kU8));
  set(hqq::named_dtype("compute_dtype", parse_dtype(c.at("compute_dtype").get<std::string>())));
  set(hqq::named_bool("view_as_float", c.at("view_as_float").get<bool>()));
  set(hqq::named_bool("channel_wise", c.at("channel_wise").get<bool>()));
  set(hqq::named_bool("optimize", c.at("optimize").get<bool>()));
  set(hqq::named_bool("round_zero", c.at("round_zero").get<bool>()));
  for (const char* field : {"quant_zero", "quant_scale", "offload_meta"}) {
    set(hqq::named_bool(field, false));
  }
  set(hqq::named_bool("stores_quant_config", true));
  return map;
}

std::vector<float> values_of(const PackedMatrix& w) {
  const Tensor decoded = decode(w, w.spec.value_dtype);
  std::vector<float> values(static_cast<std::size_t>(decoded.view().numel()));
  widen_to_f32(decoded.dtype, decoded.bytes.data(), decoded.view().numel(), values.data());
  return values;
}

double squared_error(const PackedMatrix& w, const Tensor& input) {
  double sum = 0;
  const float* weights = input.view().data<float>();
  const std::vector<float> values = values_of(w);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double d = static_cast<double>(values[i]) - static_cast<double>(weights[i]);
    sum += d * d;
  }
  return sum;
}

/// Codes of a packed matrix, in row-major order of the weights.
std::vector<int> codes_of(const PackedMatrix& w) {
  const std::int64_t code_bytes = layout_of(w.spec).code_bytes;
  std::vector<int> out;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(w.spec.cols));
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    unpack_row(w.spec.bits, w.codes.data() + r * code_bytes, w.spec.cols, row.data());
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

TEST(HqqGolden, WithoutSolverBitForBit) {
  const GoldenBook book("hqq");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    const QuantizeOptions options = options_of(c, input);
    if (options.optimize) continue;
    SCOPED_TRACE(c.dump());
    const PackedMatrix w = quantize(input.view(), options);
    const auto tensors = hqq_dialect().export_layer(w.view(), "");
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
  EXPECT_EQ(cases, 11);
}

TEST(HqqGolden, WithSolverUpToSummationOrder) {
  // Upstream's means are float32 sums in an order that torch does not state. Ours differ by at most
  // 1e-5 of a zero's size plus 1e-5, which moves one code in 5000 by one step and no error by more
  // than 0.1 %.
  const GoldenBook book("hqq");
  int cases = 0;
  std::size_t total = 0, differing = 0;
  for (const nlohmann::json& c : book.cases()) {
    const Tensor input = golden_input(c.at("input").get<std::string>(), "f32");
    const QuantizeOptions options = options_of(c, input);
    if (!options.optimize) continue;
    SCOPED_TRACE(c.dump());
    const PackedMatrix w = quantize(input.view(), options);
    const PackedMatrix golden = hqq_dialect().import_layer("", layer_of(book, c).lookup(), {});
    const auto own = hqq_dialect().export_layer(w.view(), "");
    EXPECT_EQ(tensor_named(own, "scale").bytes, bytes_of(book.field(c, "scale")));

    const hqq::GroupParameters p =
        hqq::solve(w.spec, {DType::kF32, input.bytes.data()}, serial_executor());
    const float* zero = book.field(c, "zero_f32").data<float>();
    const float* scale = book.field(c, "scale_f32").data<float>();
    for (std::size_t i = 0; i < p.zero.size(); ++i) {
      EXPECT_EQ(1.0F / p.scale[i], scale[i]) << i;
      EXPECT_NEAR(p.zero[i], zero[i], 1e-5F * (1.0F + std::fabs(zero[i]))) << i;
    }
    const std::vector<int> a = codes_of(w), b = codes_of(golden);
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_LE(std::abs(a[i] - b[i]), 1) << "code " << i;
      differing += a[i] != b[i];
    }
    total += a.size();
    EXPECT_LE(squared_error(w, input), squared_error(golden, input) * 1.001);
    ++cases;
  }
  EXPECT_EQ(cases, 22);
  EXPECT_LE(differing * 5000, total) << differing << " of " << total << " codes differ";
}

TEST(HqqGolden, ImportsAndReexportsEveryCase) {
  const GoldenBook book("hqq");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    SCOPED_TRACE(c.dump());
    TensorMap map = layer_of(book, c);
    const PackedMatrix w = hqq_dialect().import_layer("", map.lookup(), {});
    EXPECT_EQ(decode(w, w.spec.value_dtype).bytes, bytes_of(book.field(c, "dequantized")));
    EXPECT_EQ(w.spec.residue_bytes, 0);
    std::size_t fields = 0;
    for (const NamedTensor& t : hqq_dialect().export_layer(w.view(), "")) {
      if (t.kind == StateKind::kPlainOnly || t.kind == StateKind::kNone) continue;
      EXPECT_EQ(t.tensor.dtype, map.at(t.name).dtype) << t.name;
      EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
      EXPECT_EQ(t.tensor.shape, map.at(t.name).shape) << t.name;
      ++fields;
    }
    EXPECT_EQ(fields, c.at("group_size").is_null() ? 17u : 18u);
    ++cases;
  }
  EXPECT_EQ(cases, 33);
}

TEST(HqqGolden, ErrorFallsUntilTheSolverStops) {
  const Tensor input = golden_input("mix", "f32");
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    QuantizeOptions options;
    options.method = QuantizationMethod::HQQ;
    options.bits = bits;
    const PackedSpec spec = hqq::make_spec(40, 256, options);
    const hqq::GroupParameters p =
        hqq::solve(spec, {DType::kF32, input.bytes.data()}, serial_executor());
    ASSERT_GE(p.errors.size(), 2u);
    ASSERT_LE(p.errors.size(), 20u);
    for (std::size_t i = 1; i + 1 < p.errors.size(); ++i) EXPECT_LT(p.errors[i], p.errors[i - 1]);
  }
}

// ------------------------------------------------------------------ quantized scale and zero

/// Fields of a nested dictionary, as hqq 0.2.8.post1 keeps them.
void add_nested(TensorMap& map, const GoldenBook& book, const nlohmann::json& c,
                const std::string& what) {
  const std::string meta = "meta_" + what;
  if (!c.at("tensors").contains(what + "_q")) return;
  const auto set = [&](const NamedTensor& t) { map.set(t.name, t.tensor); };
  const TensorView& codes = book.field(c, what + "_q");
  map.set(what + "_q", {codes.dtype, codes.shape, bytes_of(codes)});
  for (const char* field : {".scale", ".zero"}) {
    const TensorView& t = book.field(c, meta + field);
    map.set(meta + field, {t.dtype, t.shape, bytes_of(t)});
  }
  set(hqq::named_int(meta + ".nbits", 8));
  if (what == "scale") set(hqq::named_int(meta + ".group_size", 32));
  set(hqq::named_size(meta + ".shape", c.at(meta + "_shape").get<std::vector<std::int64_t>>()));
  set(hqq::named_int(meta + ".axis", 0));
  set(hqq::named_text(meta + ".packing", "8bit_u8"));
  set(hqq::named_dtype(meta + ".unpack_view_dtype", DType::kU8));
  set(hqq::named_bool(meta + ".view_as_float", false));
  set(hqq::named_dtype(meta + ".compute_dtype", DType::kF16));
}

TensorMap meta_layer(const GoldenBook& book, const nlohmann::json& c) {
  TensorMap map;
  const auto set = [&](const NamedTensor& t) { map.set(t.name, t.tensor); };
  const TensorView& codes = book.field(c, "W_q");
  map.set("W_q", {codes.dtype, codes.shape, bytes_of(codes)});
  for (const char* what : {"scale", "zero"}) {
    if (c.at("tensors").contains(what)) {
      const TensorView& t = book.field(c, what);
      map.set(what, {t.dtype, t.shape, bytes_of(t)});
    }
    add_nested(map, book, c, what);
    const std::string quantized = std::string("quant_") + what;
    set(hqq::named_bool(quantized, c.at(quantized).get<bool>()));
  }
  const std::vector<std::int64_t> shape = {40, 256};
  set(hqq::named_size("shape", shape));
  set(hqq::named_int("nbits", 4));
  set(hqq::named_int("group_size", 64));
  set(hqq::named_int("axis", 0));
  set(hqq::named_text("packing", "4bit_u8"));
  set(hqq::named_dtype("compute_dtype", DType::kF16));
  return map;
}

TEST(HqqQuantizedMeta, ReadsAndWritesOldFilesBitForBit) {
  const GoldenBook book("hqq_quantized_meta");
  int cases = 0;
  for (const nlohmann::json& c : book.cases()) {
    SCOPED_TRACE(c.dump());
    TensorMap map = meta_layer(book, c);
    const PackedMatrix w = hqq_dialect().import_layer("", map.lookup(), {});
    EXPECT_EQ(decode(w, DType::kF16).bytes, bytes_of(book.field(c, "dequantized")));
    EXPECT_GT(w.spec.residue_bytes, 0);
    std::size_t fields = 0;
    for (const NamedTensor& t : hqq_dialect().export_layer(w.view(), "")) {
      // What the file did not have is written only for readers of plain tensors.
      if (t.kind == StateKind::kPlainOnly || t.kind == StateKind::kNone) continue;
      EXPECT_EQ(t.tensor.dtype, map.at(t.name).dtype) << t.name;
      EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
      EXPECT_EQ(t.tensor.shape, map.at(t.name).shape) << t.name;
      ++fields;
    }
    EXPECT_EQ(fields, map.size());
    ++cases;
  }
  EXPECT_EQ(cases, 3);
}

TEST(HqqQuantizedMeta, QuantizesTheStoredParametersOfUpstream) {
  // The scales do not depend on the solver: their codes, scale and zero must be upstream's.
  const GoldenBook book("hqq_quantized_meta");
  for (const nlohmann::json& c : book.cases()) {
    if (!c.at("quant_scale").get<bool>()) continue;
    const Tensor input = golden_input("mix", "f32");
    QuantizeOptions options;
    options.method = QuantizationMethod::HQQ;
    options.axis = 0;
    options.value_dtype = DType::kF16;
    PackedSpec spec = hqq::make_spec(40, 256, options);
    const hqq::GroupParameters p =
        hqq::solve(spec, {DType::kF32, input.bytes.data()}, serial_executor());
    FreshVector<float> scale = p.scale;
    for (float& s : scale) s = 1.0F / s;
    constexpr std::int64_t kGroup = 32;
    std::vector<NamedTensor> fields = hqq::blank_meta("scale", spec, kGroup);
    hqq::quantize_parameters("scale", spec, kGroup, scale, fields);
    for (const char* name : {"scale_q", "meta_scale.scale", "meta_scale.zero"}) {
      EXPECT_EQ(tensor_named(fields, name).bytes, bytes_of(book.field(c, name))) << name;
      EXPECT_EQ(tensor_named(fields, name).shape, book.field(c, name).shape) << name;
    }
  }
}

}  // namespace
}  // namespace quantal::testing

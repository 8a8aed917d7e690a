// Requests that Quanto cannot meet and layers that contradict themselves: one typed error each.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "formats/layers.h"

namespace quantal::testing {
namespace {

const Dialect& dialect() { return dialect_by_name("quanto"); }

QuantizeOptions options_of(QuantizationMethod method) {
  QuantizeOptions options;
  options.method = method;
  return options;
}

/// A good [6, 160] layer of `method` to be damaged.
TensorMap good_layer(QuantizationMethod method, const std::string& mode = "") {
  Tensor input = make_tensor(DType::kF32, {6, 160});
  for (std::size_t i = 0; i < 6 * 160; ++i) {
    const float v = static_cast<float>((i * 37) % 101) - 50.0F;
    std::memcpy(input.bytes.data() + 4 * i, &v, sizeof(v));
  }
  QuantizeOptions options = options_of(method);
  options.mode = mode;
  return TensorMap(dialect().export_layer(quantize(input.view(), options).view(), "m."));
}

struct Damage {
  const char* what;
  Errc code;
  std::vector<std::string> message;
  std::function<void(TensorMap&)> apply;
  LayerFacts facts{};
};

void expect_refused(QuantizationMethod method, const std::vector<Damage>& damages) {
  const TensorMap good = good_layer(method);
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.what);
    TensorMap map = good;
    damage.apply(map);
    LayerFacts facts = damage.facts;
    if (facts.weight_shape.empty()) facts.weight_shape = {6, 160};
    expect_error(damage.code, damage.message,
                 [&] { dialect().import_layer("m.", map.lookup(), facts); });
  }
}

void shorten(Tensor& t) { t.bytes.pop_back(); }

TEST(QuantoErrors, TensorsOfPackedLayers) {
  expect_refused(QuantizationMethod::QUANTO_INT4,
                 {{"no scale",
                   Errc::kCorrupt,
                   {"m.weight._scale", "missing"},
                   [](TensorMap& m) { m.erase("m.weight._scale"); }},
                  {"no shift",
                   Errc::kCorrupt,
                   {"m.weight._shift", "missing"},
                   [](TensorMap& m) { m.erase("m.weight._shift"); }},
                  {"cut codes",
                   Errc::kCorrupt,
                   {"m.weight._data._data", "bytes"},
                   [](TensorMap& m) { shorten(m.at("m.weight._data._data")); }},
                  {"cut scale",
                   Errc::kCorrupt,
                   {"m.weight._scale", "bytes"},
                   [](TensorMap& m) { shorten(m.at("m.weight._scale")); }},
                  {"codes of another type",
                   Errc::kDtype,
                   {"m.weight._data._data", "i8", "u8"},
                   [](TensorMap& m) { m.at("m.weight._data._data").dtype = DType::kI8; }},
                  {"integer scale",
                   Errc::kDtype,
                   {"m.weight._scale", "i32"},
                   [](TensorMap& m) { m.at("m.weight._scale").dtype = DType::kI32; }},
                  {"an activation scale of two", Errc::kShape, {"m.input_scale"}, [](TensorMap& m) {
                     m.at("m.input_scale") = make_tensor(DType::kF32, {2});
                   }}});
}

TEST(QuantoErrors, ShapesOfPackedLayers) {
  expect_refused(QuantizationMethod::QUANTO_INT4,
                 {{"four dimensions",
                   Errc::kUnsupported,
                   {"m.weight._data._data", "2 dimensions"},
                   [](TensorMap& m) {
                     m.at("m.weight._data._data").shape = {15, 32, 1, 1};
                   }},
                  {"empty codes",
                   Errc::kShape,
                   {"m.weight._data._data", "sizes >= 1"},
                   [](TensorMap& m) {
                     m.at("m.weight._data._data") = {DType::kU8, {0, 32}, {}};
                   }},
                  {"too many rows",
                   Errc::kShape,
                   {"m.weight._data._data", "rows", "30"},
                   [](TensorMap& m) {
                     m.at("m.weight._data._data") = make_tensor(DType::kU8, {16, 32});
                   }},
                  {"shift of another shape",
                   Errc::kShape,
                   {"m.weight._shift", "[30, 1]"},
                   [](TensorMap& m) {
                     m.at("m.weight._shift").shape = {1, 30};
                   }},
                  {"a shape that disagrees",
                   Errc::kShape,
                   {"m.weight", "[7, 160]"},
                   [](TensorMap&) {},
                   {.weight_shape = {7, 160}}},
                  {"a shape of negative size",
                   Errc::kUnsupported,
                   {"m.", "[-1, 160]"},
                   [](TensorMap&) {},
                   {.weight_shape = {-1, 160}}},
                  {"a huge shape",
                   Errc::kShape,
                   {"quanto: weight"},
                   [](TensorMap&) {},
                   {.weight_shape = {std::numeric_limits<std::int64_t>::max(), 160}}}});
}

TEST(QuantoErrors, SettingsOfPackedLayers) {
  expect_refused(
      QuantizationMethod::QUANTO_INT4,
      {{"a map that disagrees",
        Errc::kShape,
        {"m.weight._data._data", "qint2"},
        [](TensorMap&) {},
        {.settings = R"({"weights": "qint2"})"}},
       {"a type that is not handled",
        Errc::kUnsupported,
        {"qfloat8_e4m3fnuz", "qint8"},
        [](TensorMap&) {},
        {.settings = R"({"weights": "qfloat8_e4m3fnuz"})"}},
       {"broken settings", Errc::kCorrupt, {"m.", "JSON"}, [](TensorMap&) {}, {.settings = "{"}}});
}

TEST(QuantoErrors, ByteLayers) {
  expect_refused(QuantizationMethod::QUANTO_INT8,
                 {{"scale of another shape",
                   Errc::kShape,
                   {"m.weight._scale", "[5, 1]", "[6, 1]", "[1, 160]"},
                   [](TensorMap& m) {
                     m.at("m.weight._scale") = make_tensor(DType::kF32, {5, 1});
                   }},
                  {"codes of another type",
                   Errc::kDtype,
                   {"m.weight._data", "i8, f8e4m3"},
                   [](TensorMap& m) { m.at("m.weight._data").dtype = DType::kU8; }},
                  {"cut codes",
                   Errc::kCorrupt,
                   {"m.weight._data", "bytes"},
                   [](TensorMap& m) { shorten(m.at("m.weight._data")); }},
                  {"a map that disagrees",
                   Errc::kCorrupt,
                   {"m.weight._data", "i8", "qfloat8_e4m3fn"},
                   [](TensorMap&) {},
                   {.settings = R"({"weights": "qfloat8"})"}},
                  {"a shape that disagrees",
                   Errc::kShape,
                   {"m.weight._data", "[6, 160]", "[160, 6]"},
                   [](TensorMap&) {},
                   {.weight_shape = {160, 6}}}});
}

TEST(QuantoErrors, ZeroPointsAboveTheWidth) {
  TensorMap map = good_layer(QuantizationMethod::QUANTO_INT2, "zeropoint");
  map.at("m.weight._shift").bytes[3] = 4;
  expect_error(Errc::kCorrupt, {"m.weight._shift", "4", "at most 3"}, [&] {
    dialect().import_layer("m.", map.lookup(), {.weight_shape = {6, 160}});
  });
}

TEST(QuantoErrors, WidthsThatFewRowsDoNotTell) {
  Tensor input = make_tensor(DType::kF32, {2, 8});
  const PackedMatrix w = quantize(input.view(), options_of(QuantizationMethod::QUANTO_INT4));
  TensorMap map(dialect().export_layer(w.view(), "m."));
  expect_error(Errc::kUnsupported, {"m.weight._data._data", "2 or 4 bits", "quanto_qmap.json"},
               [&] { dialect().import_layer("m.", map.lookup(), {}); });
  const PackedMatrix again =
      dialect().import_layer("m.", map.lookup(), {.settings = R"({"weights": "qint4"})"});
  expect_same_bytes(again, w, "the map tells");
}

TEST(QuantoErrors, Options) {
  const auto refuse = [](const std::vector<std::string>& message,
                         const std::function<void(QuantizeOptions&)>& change) {
    QuantizeOptions options = options_of(QuantizationMethod::QUANTO_INT4);
    change(options);
    expect_error(Errc::kConfig, message, [&] { dialect().make_spec(16, 256, options); });
  };
  refuse({"method", "hqq", "quanto_int4"},
         [](QuantizeOptions& o) { o.method = QuantizationMethod::HQQ; });
  refuse({"mode", "'fast'", "zeropoint"}, [](QuantizeOptions& o) { o.mode = "hqq,fast"; });
  refuse({"axis", "2"}, [](QuantizeOptions& o) { o.axis = 2; });
  refuse({"value_dtype", "i8"}, [](QuantizeOptions& o) { o.value_dtype = DType::kI8; });
  refuse({"group_size", "48", "256"}, [](QuantizeOptions& o) {
    o.mode = "exact_group";
    o.group_size = 48;
  });
  refuse({"mode", "8 bits"}, [](QuantizeOptions& o) {
    o.method = QuantizationMethod::QUANTO_INT8;
    o.mode = "hqq";
  });
}

TEST(QuantoErrors, WeightsThatAreNotFinite) {
  for (const int axis : {0, -1}) {
    for (const auto method : {QuantizationMethod::QUANTO_INT4, QuantizationMethod::QUANTO_INT8}) {
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        Tensor input = make_tensor(DType::kF32, {16, 40});
        std::memcpy(input.bytes.data() + 4 * (13 * 40 + 39), &bad, sizeof(bad));
        QuantizeOptions options = options_of(method);
        options.axis = axis;
        expect_error(Errc::kUnsupported, {"row 13", "column 39"},
                     [&] { quantize(input.view(), options); });
      }
    }
  }
}

TEST(QuantoErrors, ZeroPointsInMemory) {
  Tensor input = make_tensor(DType::kF32, {4, 8});
  QuantizeOptions options = options_of(QuantizationMethod::QUANTO_INT4);
  options.mode = "zeropoint";
  PackedMatrix w = quantize(input.view(), options);
  const float bad = -3.0F;
  std::memcpy(w.stats.data() + 4, &bad, sizeof(bad));
  expect_error(Errc::kCorrupt, {"zero point", "group 0"},
               [&] { dialect().export_layer(w.view(), ""); });
}

}  // namespace
}  // namespace quantal::testing

// What every dialect promises: the same bytes for every split and instruction set, inverse import
// and export, and one typed error for bad input.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "formats/bnb/bnb_params.h"
#include "formats/layers.h"
#include "formats/quantized_forms.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

using M = QuantizationMethod;

Tensor random_matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (float& v : values) {
    v = (random.uniform(-1, 1) + random.uniform(-1, 1) + random.uniform(-1, 1)) * 0.03F;
    if (random.below(500) == 0) v *= 40;  // residuals that the solver shrinks
  }
  Tensor out = make_tensor(dtype, {rows, cols});
  narrow_from_f32(dtype, values.data(), rows * cols, out.bytes.data());
  return out;
}

struct Setting {
  const char* name;
  std::int64_t rows, cols;
  QuantizeOptions options;
};

QuantizeOptions bnb(const char* type, std::int64_t group, bool nested, DType value) {
  QuantizeOptions o;
  o.quant_type = type;
  o.group_size = group;
  o.double_quant = nested;
  o.value_dtype = value;
  return o;
}

QuantizeOptions hqq(int bits, std::int64_t group, int axis, bool optimize, DType value) {
  QuantizeOptions o;
  o.method = M::HQQ;
  o.bits = bits;
  o.group_size = group;
  o.axis = axis;
  o.optimize = optimize;
  o.value_dtype = value;
  return o;
}

std::vector<Setting> settings() {
  return {
      {"nf4", 64, 256, bnb("nf4", 64, false, DType::kF32)},
      {"nf4 nested, blocks cross rows", 65, 96, bnb("nf4", 64, true, DType::kBF16)},
      {"nf4 odd", 33, 65, bnb("nf4", 32, true, DType::kF16)},
      {"nf4 block beyond a row", 9, 100, bnb("nf4", 256, false, DType::kBF16)},
      {"nf4 one short block", 3, 5, bnb("nf4", 4096, true, DType::kF32)},
      {"fp4 odd", 7, 129, bnb("fp4", 128, false, DType::kF16)},
      {"hqq4", 64, 256, hqq(4, 64, 1, true, DType::kF32)},
      {"hqq4 plain", 64, 256, hqq(4, 64, 1, false, DType::kF16)},
      {"hqq8, groups cross rows", 64, 576, hqq(8, 128, 1, true, DType::kF32)},
      {"hqq8 by rows", 21, 50, hqq(8, 0, 1, true, DType::kBF16)},
      {"hqq4 axis 0", 64, 160, hqq(4, 64, 0, true, DType::kF16)},
      {"hqq4 axis 0, groups of 8", 24, 40, hqq(4, 8, 0, true, DType::kBF16)},
      {"hqq8 axis 0 by columns", 40, 72, hqq(8, 0, 0, true, DType::kF32)},
      {"hqq4 small groups", 32, 40, hqq(4, 8, 1, true, DType::kF32)},
  };
}

TEST(DialectBehaviour, SameBytesForEverySplitAndInstructionSet) {
  for (const Setting& s : settings()) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Tensor w = random_matrix(s.rows, s.cols, dtype, 7);
      select_cpu_kernels("scalar");
      const PackedMatrix truth = quantize(w.view(), s.options);
      for (const std::string_view set : available_cpu_kernels()) {
        select_cpu_kernels(set);
        const std::string what = std::string(s.name) + " " + std::string(set);
        expect_same_bytes(quantize(w.view(), s.options), truth, what);
        expect_same_bytes(quantize(w.view(), s.options, OddExecutor()), truth, what + " odd");
        expect_same_bytes(quantize(w.view(), s.options, ThreadExecutor()), truth,
                          what + " threads");
      }
      select_cpu_kernels(available_cpu_kernels().front());
    }
  }
}

TEST(DialectBehaviour, QuantizingWritesEveryByteHoweverRowsAreSplit) {
  for (const QuantizedForm& form : quantized_forms()) {
    const std::vector<std::uint16_t> weights = form_weights(form.rows, form.cols);
    const PackedMatrix truth = quantized(form, weights);
    const OddExecutor odd;
    const ThreadExecutor threads(2);
    for (const std::string_view set : available_cpu_kernels()) {
      select_cpu_kernels(set);
      for (const Executor* executor : {&serial_executor(), static_cast<const Executor*>(&odd),
                                       static_cast<const Executor*>(&threads)}) {
        PackedMatrix dirty = make_packed(truth.spec);
        std::ranges::fill(dirty.codes, std::uint8_t{0xA5});
        std::ranges::fill(dirty.stats, std::uint8_t{0x5A});
        dialect_by_name(form.dialect)
            .quantize(dirty.spec, DType::kBF16, weights.data(), dirty.codes.data(),
                      dirty.stats.data(), dirty.shared.data(), *executor);
        expect_same_bytes(
            dirty, truth,
            form.name + " " + std::string(set) + " by " + std::to_string(executor->num_threads()));
      }
    }
    select_cpu_kernels(available_cpu_kernels().front());
  }
}

TEST(DialectBehaviour, ImportIsTheInverseOfExport) {
  for (const Setting& s : settings()) {
    SCOPED_TRACE(s.name);
    const PackedMatrix w =
        quantize(random_matrix(s.rows, s.cols, DType::kF32, 3).view(), s.options);
    const Dialect& dialect = dialect_of(s.options.method);
    TensorMap map(dialect.export_layer(w.view(), "a.b."));
    expect_same_bytes(dialect.import_layer("a.b.", map.lookup(), {}), w, s.name);
  }
}

TEST(DialectBehaviour, QuantizingLosesLittle) {
  for (const Setting& s : settings()) {
    SCOPED_TRACE(s.name);
    const Tensor w = random_matrix(s.rows, s.cols, DType::kF32, 5);
    const Tensor decoded = decode(quantize(w.view(), s.options), DType::kF32);
    double error = 0, norm = 0;
    for (std::int64_t i = 0; i < w.view().numel(); ++i) {
      const double x = static_cast<double>(w.view().data<float>()[i]);
      error += std::pow(x - static_cast<double>(decoded.view().data<float>()[i]), 2);
      norm += x * x;
    }
    EXPECT_LT(std::sqrt(error / norm), s.options.bits == 8 ? 0.03 : 0.35);
    EXPECT_GT(error, 0);
  }
}

TEST(DialectBehaviour, NotFiniteWeightsAreNamed) {
  for (const Setting& s : settings()) {
    SCOPED_TRACE(s.name);
    for (const auto& [value, text] :
         {std::pair{std::nanf(""), "is nan"}, std::pair{HUGE_VALF, "is inf"},
          std::pair{-HUGE_VALF, "is -inf"}}) {
      Tensor w = random_matrix(s.rows, s.cols, DType::kF32, 5);
      const std::int64_t row = s.rows - 1, col = s.cols - 2;
      std::memcpy(w.bytes.data() + 4 * (row * s.cols + col), &value, 4);
      expect_error(Errc::kUnsupported,
                   {"row " + std::to_string(row), "column " + std::to_string(col), text},
                   [&] { quantize(w.view(), s.options, ThreadExecutor()); });
    }
  }
}

TEST(DialectBehaviour, IllegalOptionsAreNamed) {
  const Tensor w = random_matrix(32, 96, DType::kF32, 1);
  const auto refused = [&](QuantizeOptions o, const std::vector<std::string>& parts) {
    expect_error(Errc::kConfig, parts, [&] { quantize(w.view(), o); });
  };
  QuantizeOptions o = bnb("nf4", 48, false, DType::kF32);
  refused(o, {"bnb", "group_size is 48", "32, 64, 128, 256, 512, 1024, 2048, 4096"});
  o = bnb("int4", 64, false, DType::kF32);
  refused(o, {"quant_type is 'int4'", "nf4, fp4"});
  o = bnb("nf4", 64, false, DType::kI32);
  refused(o, {"value_dtype is i32", "f32, f16, bf16"});
  o = bnb("nf4", 64, false, DType::kF32);
  o.bits = 8;
  refused(o, {"bits is 8", "expected 4"});
  refused(hqq(7, 64, 1, true, DType::kF32), {"hqq", "bits is 7", "1, 2, 3, 4, 5, 6, 8"});
  refused(hqq(4, 64, 2, true, DType::kF32), {"axis is 2", "0, 1"});
  refused(hqq(4, 36, 1, true, DType::kF32), {"group_size is 36", "multiple of 8"});
  refused(hqq(4, 40, 1, true, DType::kF32), {"group_size is 40", "divides the 3072 weights"});
  refused(hqq(4, -64, 1, true, DType::kF32), {"group_size is -64"});
  const Tensor odd = random_matrix(3, 64, DType::kF32, 1);
  expect_error(Errc::kShape, {"grouped matrix are 3", "even number at 4 bits"},
               [&] { quantize(odd.view(), hqq(4, 64, 1, true, DType::kF32)); });
}

TEST(DialectBehaviour, WorkedExamplesOfTheDocumentation) {
  const std::vector<float> four = {0.5F, -1.0F, 0.25F, 0.0F};
  Tensor w{DType::kF32, {1, 4}, std::vector<std::uint8_t>(16)};
  std::memcpy(w.bytes.data(), four.data(), 16);
  const auto nf4 =
      dialect_of(M::BNB_NF4)
          .export_layer(quantize(w.view(), bnb("nf4", 64, false, DType::kF32)).view(), "");
  EXPECT_EQ(tensor_named(nf4, "weight").bytes, (std::vector<std::uint8_t>{0xC0, 0xA7}));

  const std::vector<float> two_rows = {-0.2F, 0.0F, 0.11F, 0.4F, -0.2F, 0.0F, 0.11F, 0.4F};
  w = {DType::kF32, {2, 4}, std::vector<std::uint8_t>(32)};
  std::memcpy(w.bytes.data(), two_rows.data(), 32);
  const auto tensors = dialect_of(M::HQQ).export_layer(
      quantize(w.view(), hqq(4, 0, 1, false, DType::kF32)).view(), "");
  EXPECT_EQ(tensor_named(tensors, "W_q").bytes,
            (std::vector<std::uint8_t>{0x00, 0x55, 0x88, 0xFF}));
  const float* zero = tensor_named(tensors, "zero").view().data<float>();
  EXPECT_EQ(zero[0], 5.0F);
  EXPECT_NEAR(tensor_named(tensors, "scale").view().data<float>()[0], 0.04F, 1e-8F);
}

TEST(DialectBehaviour, OfTwoZerosTheFirstIsTheExtreme) {
  // -min * scale keeps the sign of the first zero of a group, as upstream's minimum does.
  for (const std::string_view set : available_cpu_kernels()) {
    select_cpu_kernels(set);
    for (const auto& [first, second] : {std::pair{0.0F, -0.0F}, std::pair{-0.0F, 0.0F}}) {
      std::vector<float> values(64, 0.5F);
      values[21] = first;
      values[32] = second;
      const TensorView w{
          DType::kF32,
          {1, 64},
          {reinterpret_cast<const std::uint8_t*>(values.data()), 64 * sizeof(float)}};
      const auto tensors = dialect_of(M::HQQ).export_layer(
          quantize(w, hqq(8, 64, 1, false, DType::kF32)).view(), "");
      EXPECT_EQ(std::signbit(tensor_named(tensors, "zero").view().data<float>()[0]),
                !std::signbit(first))
          << set;
    }
  }
  select_cpu_kernels(available_cpu_kernels().front());
}

// ------------------------------------------------------------------ hostile layers

/// A layer of each dialect as tensors, to be damaged.
TensorMap bnb_layer(bool nested) {
  const PackedMatrix w =
      quantize(random_matrix(33, 65, DType::kF32, 2).view(), bnb("nf4", 64, nested, DType::kBF16));
  return TensorMap(dialect_of(M::BNB_NF4).export_layer(w.view(), "l."));
}
TensorMap hqq_layer() {
  const PackedMatrix w =
      quantize(random_matrix(32, 64, DType::kF32, 2).view(), hqq(4, 64, 1, false, DType::kF16));
  return TensorMap(dialect_of(M::HQQ).export_layer(w.view(), "l."));
}

constexpr const char* kState = "l.weight.quant_state.bitsandbytes__nf4";

void set_text(TensorMap& map, const std::string& name, const std::string& text) {
  map.set(name, {DType::kU8, {static_cast<std::int64_t>(text.size())}, {text.begin(), text.end()}});
}

std::string replaced(const Tensor& text, const std::string& from, const std::string& to) {
  std::string s(text.bytes.begin(), text.bytes.end());
  const std::size_t at = s.find(from);
  EXPECT_NE(at, std::string::npos) << s;
  return s.replace(at, from.size(), to);
}

void expect_import_error(M method, Errc code, const std::vector<std::string>& parts,
                         TensorMap& map) {
  expect_error(code, parts, [&] { dialect_of(method).import_layer("l.", map.lookup(), {}); });
}

TEST(HostileLayer, BnbMissingTensors) {
  for (const char* name : {"l.weight", "l.weight.absmax", "l.weight.quant_map",
                           "l.weight.nested_absmax", "l.weight.nested_quant_map", kState}) {
    TensorMap map = bnb_layer(true);
    map.erase(name);
    expect_import_error(M::BNB_NF4, Errc::kCorrupt, {std::string("tensor ") + name, "is missing"},
                        map);
  }
}

TEST(HostileLayer, BnbLyingState) {
  const std::vector<std::tuple<const char*, const char*, Errc, const char*>> lies = {
      {"[33, 65]", "[33, 66]", Errc::kShape, "expected 1089"},
      {"[33, 65]", "[33, -65]", Errc::kCorrupt, "shape"},
      {"[33, 65]", "[4611686018427387904, 65]", Errc::kShape, "elements"},
      {"[33, 65]", "[]", Errc::kCorrupt, "shape"},
      {"\"blocksize\": 64", "\"blocksize\": 0", Errc::kCorrupt, "blocksize"},
      {"\"blocksize\": 64", "\"blocksize\": 32", Errc::kShape, "weight.absmax"},
      {"\"blocksize\": 64", "\"block\": 64", Errc::kCorrupt, "missing"},
      {"bfloat16", "int8", Errc::kCorrupt, "dtype"},
      {"\"nf4\"", "\"fp4\"", Errc::kCorrupt, "quant_type"},
      {"}", "", Errc::kCorrupt, "not a JSON object"},
  };
  for (const auto& [from, to, code, part] : lies) {
    SCOPED_TRACE(to);
    TensorMap map = bnb_layer(false);
    set_text(map, kState, replaced(map.at(kState), from, to));
    expect_import_error(M::BNB_NF4, code, {part}, map);
  }
}

TEST(HostileLayer, BnbWrongTypes) {
  TensorMap map = bnb_layer(false);
  map.at("l.weight.absmax").dtype = DType::kI32;
  expect_import_error(M::BNB_NF4, Errc::kDtype, {"l.weight.absmax", "i32", "f32, f16, bf16"}, map);
  map = bnb_layer(false);
  map.at("l.weight.absmax").bytes.pop_back();
  expect_import_error(M::BNB_NF4, Errc::kCorrupt, {"l.weight.absmax", "bytes"}, map);
}

TEST(HostileLayer, HqqMissingTensors) {
  for (const char* name :
       {"l.W_q", "l.scale", "l.zero", "l.shape", "l.nbits", "l.axis", "l.compute_dtype"}) {
    TensorMap map = hqq_layer();
    map.erase(name);
    expect_import_error(M::HQQ, Errc::kCorrupt, {std::string("tensor ") + name, "is missing"}, map);
  }
}

TEST(HostileLayer, HqqLyingFields) {
  const std::vector<std::tuple<const char*, int, Errc, const char*>> lies = {
      {"l.nbits", 7, Errc::kUnsupported, "nbits is 7"},
      {"l.nbits", 3, Errc::kCorrupt, "packing"},
      {"l.nbits", 8, Errc::kCorrupt, "packing"},
      {"l.axis", 2, Errc::kCorrupt, "axis is 2"},
      {"l.axis", 0, Errc::kShape, ""},
      {"l.group_size", 0, Errc::kCorrupt, "group_size is 0"},
      {"l.group_size", 60, Errc::kCorrupt, "group_size is 60"},
      {"l.group_size", 32, Errc::kShape, "l.W_q"},
      {"l.shape", 16, Errc::kShape, "W_q"},
      {"l.quant_zero", 1, Errc::kCorrupt, "l.zero_q"},
      {"l.view_as_float", 1, Errc::kDtype, "l.W_q"},
  };
  for (const auto& [name, value, code, part] : lies) {
    SCOPED_TRACE(std::string(name) + " = " + std::to_string(value));
    TensorMap map = hqq_layer();
    map.at(name).bytes[0] = static_cast<std::uint8_t>(value);
    if (std::string(name) == "l.axis" && value == 0) {
      // Same number of groups along the other axis: legal, so damage the scale as well.
      map.at("l.scale").shape = {16, 1};
      map.at("l.scale").bytes.resize(32);
    }
    expect_import_error(M::HQQ, code, {part}, map);
  }
  TensorMap map = hqq_layer();
  set_text(map, "l.compute_dtype", "torch.int8");
  expect_import_error(M::HQQ, Errc::kCorrupt, {"compute_dtype"}, map);
  set_text(map, "l.compute_dtype", "__import__('os')");
  expect_import_error(M::HQQ, Errc::kDtype, {}, map);
}

// ------------------------------------------------------------------ what bytes hold beyond codes

TEST(Residue, StoredQuantMapIsHonoured) {
  TensorMap map = bnb_layer(true);
  const float own = 0.625F;
  std::memcpy(map.at("l.weight.quant_map").bytes.data() + 15 * 4, &own, 4);
  const Dialect& dialect = dialect_of(M::BNB_NF4);
  const PackedMatrix w = dialect.import_layer("l.", map.lookup(), {});
  EXPECT_EQ(w.spec.code_map, CodeMap::kTable);
  const PackedMatrix plain = [&] {
    TensorMap standard = bnb_layer(true);
    return dialect.import_layer("l.", standard.lookup(), {});
  }();
  EXPECT_NE(decode(w, DType::kF32).bytes, decode(plain, DType::kF32).bytes);
  for (const NamedTensor& t : dialect.export_layer(w.view(), "l.")) {
    EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
  }
}

TEST(Residue, PadNibbleOfAnOddTensorSurvives) {
  TensorMap map = bnb_layer(false);  // 33 * 65 is odd
  EXPECT_EQ(map.at("l.weight").bytes.back() & 15, bnb::pad_nibble(false));
  map.at("l.weight").bytes.back() ^= 9;
  const Dialect& dialect = dialect_of(M::BNB_NF4);
  const PackedMatrix w = dialect.import_layer("l.", map.lookup(), {});
  const auto tensors = dialect.export_layer(w.view(), "l.");
  EXPECT_EQ(tensor_named(tensors, "l.weight").bytes, map.at("l.weight").bytes);
}

TEST(Residue, HalfPrecisionAbsmaxIsWidened) {
  TensorMap map = bnb_layer(false);
  Tensor& absmax = map.at("l.weight.absmax");
  const std::int64_t n = absmax.view().numel();
  Tensor half = make_tensor(DType::kF16, {n});
  narrow_from_f32(DType::kF16, absmax.view().data<float>(), n, half.bytes.data());
  Tensor wide = make_tensor(DType::kF32, {n});
  widen_to_f32(DType::kF16, half.bytes.data(), n, reinterpret_cast<float*>(wide.bytes.data()));
  const Dialect& dialect = dialect_of(M::BNB_NF4);
  map.set("l.weight.absmax", half);
  const Tensor a = decode(dialect.import_layer("l.", map.lookup(), {}), DType::kF32);
  map.set("l.weight.absmax", wide);
  EXPECT_EQ(a.bytes, decode(dialect.import_layer("l.", map.lookup(), {}), DType::kF32).bytes);
}

}  // namespace
}  // namespace quantal::testing

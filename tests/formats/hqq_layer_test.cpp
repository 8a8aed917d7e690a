// HQQ layers: every width and grouping, forms that only old files have, damaged fields.
#include <gtest/gtest.h>

#include <cmath>

#include "formats/hqq/hqq_params.h"
#include "formats/hqq/hqq_state.h"
#include "formats/layers.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

const Dialect& hqq_dialect() { return dialect_of(QuantizationMethod::HQQ); }

Tensor random_weights(std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  Random random(seed);
  Tensor out = make_tensor(DType::kF32, {rows, cols});
  auto* values = reinterpret_cast<float*>(out.bytes.data());
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    values[i] = (random.uniform(-1, 1) + random.uniform(-1, 1)) * 0.03F;
    if (random.below(300) == 0) values[i] *= 40;  // residuals that the solver shrinks
  }
  return out;
}

struct Case {
  std::string name;
  std::int64_t rows, cols;
  QuantizeOptions options;
};

QuantizeOptions with(int bits, std::int64_t group, int axis) {
  QuantizeOptions o;
  o.method = QuantizationMethod::HQQ;
  o.bits = bits;
  o.group_size = group;
  o.axis = axis;
  o.value_dtype = DType::kF16;
  return o;
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    for (const int axis : {0, 1}) {
      const std::string name =
          std::to_string(bits) + " bits, axis " + std::to_string(axis) + ", group ";
      for (const std::int64_t group : {8, 24, 64, 0}) {
        Case c{name + std::to_string(group), 48, 192, with(bits, group, axis)};
        c.options.optimize = group != 24;
        out.push_back(c);
      }
    }
  }
  Case ternary{"ternary", 40, 128, with(2, 32, 1)};
  ternary.options.mode = "1.58";
  out.push_back(ternary);
  out.push_back({"3 bits, padded rows", 24, 40, with(3, 40, 1)});
  out.push_back({"3 bits, padded rows, axis 0", 24, 40, with(3, 8, 0)});
  for (const int axis : {0, 1}) {
    for (const auto& [zero, scale] : {std::pair{true, false}, {false, true}, {true, true}}) {
      Case c{"meta, axis " + std::to_string(axis), 64, 256, with(4, 64, axis)};
      c.options.quant_zero = zero;
      c.options.quant_scale = scale;
      out.push_back(c);
    }
  }
  return out;
}

TensorMap exported(const PackedMatrix& w) {
  return TensorMap(hqq_dialect().export_layer(w.view(), ""));
}

PackedMatrix imported(TensorMap& map) { return hqq_dialect().import_layer("", map.lookup(), {}); }

void set(TensorMap& map, const NamedTensor& t) { map.set(t.name, t.tensor); }

TEST(HqqLayer, SameBytesForEverySplitAndInstructionSet) {
  for (const Case& c : cases()) {
    const Tensor w = random_weights(c.rows, c.cols, 11);
    select_cpu_kernels("scalar");
    const PackedMatrix truth = quantize(w.view(), c.options);
    for (const std::string_view set_name : available_cpu_kernels()) {
      select_cpu_kernels(set_name);
      const std::string what = c.name + " " + std::string(set_name);
      expect_same_bytes(quantize(w.view(), c.options), truth, what);
      expect_same_bytes(quantize(w.view(), c.options, ThreadExecutor()), truth, what);
      EXPECT_EQ(decode(truth, DType::kF16).bytes, decode(truth, DType::kF16).bytes) << what;
    }
    select_cpu_kernels(available_cpu_kernels().front());
  }
}

TEST(HqqLayer, ImportIsTheInverseOfExport) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const PackedMatrix w = quantize(random_weights(c.rows, c.cols, 12).view(), c.options);
    TensorMap map = exported(w);
    expect_same_bytes(imported(map), w, c.name);
  }
}

TEST(HqqLayer, MoreBitsLoseLess) {
  double before = HUGE_VAL;
  const Tensor w = random_weights(64, 256, 13);
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    const Tensor decoded = decode(quantize(w.view(), with(bits, 64, 1)), DType::kF32);
    double error = 0;
    for (std::int64_t i = 0; i < w.view().numel(); ++i) {
      error += std::fabs(static_cast<double>(w.view().data<float>()[i]) -
                         static_cast<double>(decoded.view().data<float>()[i]));
    }
    EXPECT_LT(error, before * 0.75) << bits;
    before = error;
  }
}

TEST(HqqLayer, TernaryCodesAreWrittenAsAFraction) {
  QuantizeOptions options = with(2, 32, 1);
  options.mode = "1.58";
  TensorMap map = exported(quantize(random_weights(8, 64, 3).view(), options));
  float bits = 0;
  std::memcpy(&bits, map.at("nbits").bytes.data(), sizeof(bits));
  EXPECT_EQ(bits, 1.58F);
  for (const std::uint8_t byte : map.at("W_q").bytes) {
    for (int shift = 0; shift < 8; shift += 2) EXPECT_LE(byte >> shift & 3, 2);
  }
}

// ------------------------------------------------------------------ forms of files

PackedMatrix sample(int bits = 4, int axis = 1, std::int64_t rows = 32) {
  return quantize(random_weights(rows, 64, 2).view(), with(bits, 32, axis));
}

TEST(HqqFiles, TorchFilesHoldPythonObjects) {
  const auto tensors = hqq_dialect().export_layer(sample().view(), "m.");
  const std::map<std::string, StateKind> kinds = {{"m.W_q", StateKind::kTensor},
                                                  {"m.scale", StateKind::kTensor},
                                                  {"m.nbits", StateKind::kInt},
                                                  {"m.shape", StateKind::kSize},
                                                  {"m.packing", StateKind::kText},
                                                  {"m.compute_dtype", StateKind::kDtype},
                                                  {"m.view_as_float", StateKind::kBool},
                                                  {"m.group_size", StateKind::kInt},
                                                  {"m.unpack_view_dtype", StateKind::kDtype},
                                                  {"m.encoded_state_dict", StateKind::kPlainOnly},
                                                  {"m.stores_quant_config", StateKind::kBool}};
  std::size_t found = 0;
  for (const NamedTensor& t : tensors) {
    if (const auto it = kinds.find(t.name); it != kinds.end()) {
      EXPECT_EQ(t.kind, it->second) << t.name;
      ++found;
    }
  }
  EXPECT_EQ(found, kinds.size());
}

TEST(HqqFiles, OldNestedDictionary) {
  // {W_q, meta: {...}} of an old torch file, without the fields that came later.
  const PackedMatrix w = sample();
  TensorMap old;
  for (const char* field : {"scale", "zero", "shape", "nbits", "group_size", "axis", "packing",
                            "compute_dtype", "quant_zero", "quant_scale"}) {
    TensorMap map = exported(w);
    old.set(std::string("meta.") + field, map.at(field));
  }
  old.set("W_q", exported(w).at("W_q"));
  const auto has = [&](const std::string& name) { return old.lookup()(name) != nullptr; };
  EXPECT_TRUE(hqq_dialect().recognizes(has));
  const PackedMatrix back = imported(old);
  EXPECT_EQ(back.codes, w.codes);
  EXPECT_EQ(back.stats, w.stats);
  // What it lacked goes only to files whose readers insist on it.
  std::size_t objects = 0, plain = 0;
  for (const NamedTensor& t : hqq_dialect().export_layer(back.view(), "")) {
    (t.kind == StateKind::kPlainOnly ? plain : objects) += 1;
  }
  EXPECT_EQ(objects, 11u);
  EXPECT_EQ(plain, 8u);
}

TEST(HqqFiles, GroupSizeNone) {
  for (const int axis : {0, 1}) {
    const PackedMatrix w = quantize(random_weights(40, 64, 5).view(), with(3, 0, axis));
    TensorMap map = exported(w);
    map.erase("group_size");
    const PackedMatrix back = imported(map);
    EXPECT_EQ(decode(back, DType::kF16).bytes, decode(w, DType::kF16).bytes);
    bool none = false;
    for (const NamedTensor& t : hqq_dialect().export_layer(back.view(), "")) {
      none = none || (t.name == "group_size" && t.kind == StateKind::kNone);
    }
    EXPECT_TRUE(none);
  }
}

TEST(HqqFiles, OneScaleForTheMatrix) {
  for (const int axis : {0, 1}) {
    for (const bool sized : {false, true}) {
      TensorMap map = exported(sample(4, 1));
      set(map, hqq::named_bool("channel_wise", false));
      set(map, hqq::named_int("axis", axis));
      if (!sized) map.erase("group_size");
      Tensor scale = make_tensor(DType::kF16, {}), zero = make_tensor(DType::kF16, {});
      const float s = 0.25F, z = 7.5F;
      narrow_from_f32(DType::kF16, &s, 1, scale.bytes.data());
      narrow_from_f32(DType::kF16, &z, 1, zero.bytes.data());
      map.set("scale", scale);
      map.set("zero", zero);
      map.at("W_q").shape = {16, 64};
      const PackedMatrix w = imported(map);
      const Tensor values = decode(w, DType::kF32);
      const int code = map.at("W_q").bytes[0] >> 4;
      EXPECT_EQ(values.view().data<float>()[0], (static_cast<float>(code) - 7.5F) * 0.25F);
      TensorMap again = exported(w);
      for (const char* field : {"W_q", "scale", "zero", "axis", "channel_wise"}) {
        EXPECT_EQ(again.at(field).bytes, map.at(field).bytes) << field;
        EXPECT_EQ(again.at(field).shape, map.at(field).shape) << field;
      }
      // A file without the field is understood by its single scale.
      map.erase("channel_wise");
      EXPECT_EQ(decode(imported(map), DType::kF32).bytes, values.bytes);
    }
  }
}

TEST(HqqFiles, StackedZeroAndScale) {
  TensorMap map = exported(sample());
  Tensor both = map.at("zero");
  both.shape.insert(both.shape.begin(), 2);
  const Tensor scale = map.at("scale");
  both.bytes.insert(both.bytes.end(), scale.bytes.begin(), scale.bytes.end());
  const std::vector<std::uint8_t> values = decode(imported(map), DType::kF16).bytes;
  map.erase("zero");
  map.erase("scale");
  map.set("zero_scale", both);
  set(map, hqq::named_bool("offload_meta", true));
  const PackedMatrix w = imported(map);
  EXPECT_EQ(decode(w, DType::kF16).bytes, values);
  TensorMap again = exported(w);
  EXPECT_EQ(again.at("zero_scale").bytes, both.bytes);
  EXPECT_EQ(again.at("zero_scale").shape, both.shape);
  EXPECT_EQ(again.size(), map.size());
}

TEST(HqqFiles, StackedQuantizedZeroAndScale) {
  QuantizeOptions options = with(4, 64, 0);
  options.quant_zero = options.quant_scale = true;
  TensorMap map = exported(quantize(random_weights(64, 256, 6).view(), options));
  // Offloaded metadata has zeros grouped like scales: here the scales' own tensors twice.
  for (const char* field : {"nbits", "group_size", "shape", "scale", "zero", "axis"}) {
    map.set(std::string("meta_zero.") + field, map.at(std::string("meta_scale.") + field));
  }
  Tensor both = map.at("scale_q");
  const std::vector<std::uint8_t> half = both.bytes;
  both.shape.insert(both.shape.begin(), 2);
  both.bytes.insert(both.bytes.end(), half.begin(), half.end());
  map.erase("zero_q");
  map.erase("scale_q");
  map.set("zero_scale", both);
  const PackedMatrix w = imported(map);
  TensorMap again = exported(w);
  EXPECT_EQ(again.at("zero_scale").bytes, both.bytes);
  EXPECT_EQ(again.at("zero_scale").shape, both.shape);
  EXPECT_EQ(again.at("meta_zero.scale").bytes, map.at("meta_scale.scale").bytes);
  // Equal codes and parameters: every zero is its scale.
  const Tensor values = decode(w, DType::kF32);
  EXPECT_TRUE(std::isfinite(values.view().data<float>()[0]));
}

TEST(HqqFiles, ViewAsFloatOfAnyFloatType) {
  for (const int bits : {3, 4}) {
    for (const DType stored : {DType::kF32, DType::kBF16, DType::kF16}) {
      const PackedMatrix w = sample(bits);
      TensorMap map = exported(w);
      Tensor codes = map.at("W_q");
      const auto word = static_cast<std::int64_t>(dtype_size(codes.dtype));
      codes.shape[1] = codes.shape[1] * word / static_cast<std::int64_t>(dtype_size(stored));
      codes.dtype = stored;
      map.set("W_q", codes);
      set(map, hqq::named_bool("view_as_float", true));
      const PackedMatrix back = imported(map);
      EXPECT_EQ(back.codes, w.codes);
      TensorMap again = exported(back);
      EXPECT_EQ(again.at("W_q").dtype, stored);
      EXPECT_EQ(again.at("W_q").shape, codes.shape);
      EXPECT_EQ(again.at("W_q").bytes, codes.bytes);
    }
  }
}

TEST(HqqFiles, CodesThatWereNeverPacked) {
  const PackedMatrix w = sample(3);
  TensorMap map = exported(w);
  map.erase("packing");
  std::vector<float> codes;
  std::vector<std::uint8_t> row(64);
  for (std::int64_t r = 0; r < 32; ++r) {
    unpack_row(3, w.codes.data() + r * layout_of(w.spec).code_bytes, 64, row.data());
    codes.insert(codes.end(), row.begin(), row.end());
  }
  Tensor numbers = make_tensor(DType::kBF16, {64, 32});
  narrow_from_f32(DType::kBF16, codes.data(), 2048, numbers.bytes.data());
  map.set("W_q", numbers);
  const PackedMatrix back = imported(map);
  EXPECT_EQ(back.codes, w.codes);
  TensorMap again = exported(back);
  EXPECT_EQ(again.at("W_q").bytes, numbers.bytes);
  EXPECT_EQ(again.at("W_q").dtype, DType::kBF16);
  codes[5] = 2.5F;
  narrow_from_f32(DType::kBF16, codes.data(), 2048, numbers.bytes.data());
  map.set("W_q", numbers);
  expect_error(Errc::kCorrupt, {"W_q", "2.5", "codes 0 to 7"}, [&] { imported(map); });
}

TEST(HqqFiles, StrayBitsOfThreeBitWordsSurvive) {
  for (const int axis : {0, 1}) {
    const PackedMatrix w = sample(3, axis, 24);  // 48 or 32 grouped rows: not multiples of 10
    TensorMap map = exported(w);
    EXPECT_EQ(imported(map).spec.residue_bytes, 0);
    std::vector<std::uint8_t>& words = map.at("W_q").bytes;
    words[3] |= 0x80;                 // a top bit
    words[words.size() - 4] ^= 0x05;  // the last part of the last word: a missing row
    const PackedMatrix back = imported(map);
    EXPECT_GT(back.spec.residue_bytes, 0);
    EXPECT_EQ(back.codes, w.codes);
    EXPECT_EQ(exported(back).at("W_q").bytes, words);
  }
}

// ------------------------------------------------------------------ bad input

TEST(HqqHostile, CodesAboveTheDeclaredWidth) {
  TensorMap map = exported(sample(6));
  map.at("W_q").bytes[70] = 64;
  expect_error(Errc::kCorrupt, {"W_q", "above 63"}, [&] { imported(map); });
}

TEST(HqqHostile, RowsThatDoNotFillABlock) {
  // Upstream drops or repeats such rows and cannot read the result.
  const Tensor w = random_weights(3, 64, 1);
  for (const auto& [bits, part] :
       {std::pair{4, "an even number"}, {2, "a multiple of 4"}, {1, "a multiple of 8"}}) {
    expect_error(Errc::kShape, {"grouped matrix are 3", part},
                 [&] { quantize(w.view(), with(bits, 64, 1)); });
  }
  for (const int bits : {8, 6, 5, 3}) EXPECT_NO_THROW(quantize(w.view(), with(bits, 64, 1)));
  QuantizeOptions meta = with(8, 64, 1);
  meta.quant_scale = true;
  expect_error(Errc::kConfig, {"quant_scale", "3 groups", "multiple of 128"},
               [&] { quantize(w.view(), meta); });
  QuantizeOptions mode = with(4, 64, 1);
  mode.mode = "1.58";
  expect_error(Errc::kConfig, {"mode is '1.58' with bits 4"}, [&] { quantize(w.view(), mode); });
}

TensorMap meta_layer() {
  QuantizeOptions options = with(4, 64, 1);
  options.quant_zero = options.quant_scale = true;
  return exported(quantize(random_weights(64, 256, 7).view(), options));
}

TEST(HqqHostile, NestedDictionaries) {
  const auto refused = [](const std::string& name, const NamedTensor& value, Errc code,
                          const std::string& part) {
    SCOPED_TRACE(name);
    TensorMap map = meta_layer();
    map.set(name, value.tensor);
    expect_error(code, {part}, [&] { imported(map); });
  };
  const std::vector<std::int64_t> shape = {300, 1};
  refused("meta_zero.shape", hqq::named_size("", shape), Errc::kShape, "meta_zero.shape");
  refused("meta_zero.nbits", hqq::named_int("", 9), Errc::kUnsupported, "meta_zero.nbits");
  refused("meta_zero.nbits", hqq::named_int("", 4), Errc::kShape, "zero_q");
  refused("meta_scale.axis", hqq::named_int("", 3), Errc::kCorrupt, "meta_scale.axis");
  refused("meta_scale.compute_dtype", hqq::named_text("", "torch.bfloat16"), Errc::kUnsupported,
          "meta_scale.compute_dtype");
  refused("meta_scale.view_as_float", hqq::named_bool("", true), Errc::kUnsupported,
          "view_as_float");
  refused("meta_scale.scale", {"", make_tensor(DType::kF16, {0}), StateKind::kTensor}, Errc::kShape,
          "meta_scale.scale");
  refused("meta_scale.zero", {"", make_tensor(DType::kF16, {5}), StateKind::kTensor}, Errc::kShape,
          "meta_scale.zero");
  for (const char* name : {"zero_q", "scale_q", "meta_zero.scale", "meta_scale.axis"}) {
    TensorMap map = meta_layer();
    map.erase(name);
    expect_error(Errc::kCorrupt, {name, "is missing"}, [&] { imported(map); });
  }
}

TEST(HqqHostile, ResidueOfAnotherPlace) {
  QuantizeOptions options = with(4, 64, 1);
  options.quant_zero = true;
  const PackedMatrix w = quantize(random_weights(64, 256, 7).view(), options);
  const auto exports = [](const PackedMatrix& m) {
    return hqq_dialect().export_layer(m.view(), "").size();
  };
  const std::size_t fields = exports(w);
  EXPECT_GT(fields, 20u);
  // Damage anywhere is an error or other fields, never a crash.
  int errors = 0;
  for (std::size_t i = 0; i < w.shared.size(); i += i < 300 ? 1 : 17) {
    for (const std::uint8_t flip : {std::uint8_t{1}, std::uint8_t{128}, std::uint8_t{255}}) {
      PackedMatrix bad = w;
      bad.shared[i] ^= flip;
      try {
        exports(bad);
      } catch (const Error&) {
        ++errors;
      }
    }
  }
  EXPECT_GT(errors, 10);
}

TEST(HqqHostile, Sizes) {
  const auto refused = [](const std::vector<std::int64_t>& shape, Errc code,
                          const std::string& part) {
    TensorMap map = exported(sample());
    set(map, hqq::named_size("shape", shape));
    expect_error(code, {part}, [&] { imported(map); });
  };
  refused({std::int64_t{1} << 62, 4}, Errc::kShape, "shape");
  refused({-32, -64}, Errc::kShape, "shape");
  refused({32, 8, 8}, Errc::kUnsupported, "3 dimensions");
  refused(std::vector<std::int64_t>(9, 1), Errc::kUnsupported, "9 dimensions");
  TensorMap map = exported(sample());
  map.at("W_q").shape = {32, 32};
  map.at("W_q").shape.push_back(1);
  expect_error(Errc::kShape, {"W_q", "[32, 32, 1]", "expected [32, 32]"}, [&] { imported(map); });
  set(map, hqq::named_float("nbits", 3.5F));
  expect_error(Errc::kUnsupported, {"nbits is 3.5"}, [&] { imported(map); });
}

}  // namespace
}  // namespace quantal::testing

// Layers of the golden Quanto checkpoints, what files hold beyond codes, settings and side files.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "checkpoint/sha256.h"
#include "formats/layers.h"
#include "formats/quanto/quanto_checkpoint.h"
#include "formats/quanto/quanto_params.h"
#include "quantal/archive.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

const Dialect& dialect() { return dialect_by_name("quanto"); }

std::string read_text(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

SideTexts texts_of(const std::string& folder) {
  SideTexts texts;
  for (const char* name : {"config.json", "quanto_qmap.json"}) {
    const std::string text = read_text(golden_path("checkpoints/" + folder + "/" + name));
    if (!text.empty()) texts[name] = text;
  }
  return texts;
}

std::string digest_as_f32(const Tensor& values) {
  std::vector<float> wide(static_cast<std::size_t>(values.view().numel()));
  widen_to_f32(values.dtype, values.bytes.data(), values.view().numel(), wide.data());
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(wide.data()), wide.size() * sizeof(float)});
  return hash.hex();
}

/// Tensors of a golden checkpoint and the settings beside them.
struct Golden {
  TensorMap tensors;
  std::set<std::string> names, prefixes;
  std::map<std::string, std::string> settings;

  void add(const std::string& name, const TensorView& view) {
    tensors.set(name, {view.dtype, view.shape, bytes_of(view)});
    names.insert(name);
    const std::size_t at = name.find(".weight._scale");
    if (at != std::string::npos) prefixes.insert(name.substr(0, at + 1));
  }
  LayerFacts facts(const std::string& prefix) const {
    const auto own = settings.find(prefix.substr(0, prefix.size() - 1));
    const auto common = settings.find("");
    if (own != settings.end()) return {.settings = own->second};
    return {.settings = common == settings.end() ? "{}" : common->second};
  }
};

Golden open_folder(const std::string& folder) {
  Golden out;
  const SafetensorsFile file(golden_path("checkpoints/" + folder + "/model.safetensors"));
  for (const auto& [name, view] : file.tensors()) out.add(name, view);
  out.settings = dialect().read_settings(texts_of(folder));
  return out;
}

void add_torch(Golden& golden, const TorchFile& file, const TorchValue& state) {
  for (const auto& [key, value] : state.pairs()) {
    golden.add(key.as_text(), file.read(value.as_tensor()).view);
  }
}

/// Imports every layer, compares its values with `expected`, exports it again. Returns the specs.
std::vector<LayerEntry> check_layers(Golden& golden, const nlohmann::json& expected) {
  std::vector<LayerEntry> out;
  const TensorLookup lookup = golden.tensors.lookup();
  for (const std::string& prefix : golden.prefixes) {
    EXPECT_TRUE(dialect().recognizes(
        [&](const std::string& suffix) { return golden.names.count(prefix + suffix) != 0; }));
    LayerFacts facts = golden.facts(prefix);
    facts.weight_shape =
        expected.at(prefix + "weight").at("shape").get<std::vector<std::int64_t>>();
    const PackedMatrix w = dialect().import_layer(prefix, lookup, facts);
    EXPECT_EQ(w.spec.residue_bytes, 0) << prefix;
    EXPECT_EQ(digest_as_f32(decode(w, w.spec.value_dtype)),
              expected.at(prefix + "weight").at("sha256_f32"))
        << prefix;
    std::set<std::string> below, written;
    for (const std::string& name : golden.names) {
      if (name.starts_with(prefix)) below.insert(name);
    }
    for (const NamedTensor& t : dialect().export_layer(w.view(), prefix)) {
      written.insert(t.name);
      if (below.count(t.name) == 0) continue;
      const Tensor& original = golden.tensors.at(t.name);
      EXPECT_EQ(t.tensor.dtype, original.dtype) << t.name;
      EXPECT_EQ(t.tensor.shape, original.shape) << t.name;
      EXPECT_EQ(t.tensor.bytes, original.bytes) << t.name;
    }
    EXPECT_EQ(written, below);
    out.push_back({prefix.substr(0, prefix.size() - 1), w.spec});
  }
  return out;
}

nlohmann::json expected_of(const std::string& name) {
  return nlohmann::json::parse(read_text(golden_path("vectors/checkpoint_expected.json"))).at(name);
}

TEST(QuantoLayers, NativeFolders) {
  for (const char* name : {"quanto-int2", "quanto-int4", "quanto-int8", "quanto-float8"}) {
    SCOPED_TRACE(name);
    Golden golden = open_folder(name);
    const std::vector<LayerEntry> layers = check_layers(golden, expected_of(name));
    EXPECT_EQ(layers.size(), golden.settings.size());
    EXPECT_GE(layers.size(), 14u);
    const SideFiles files = dialect().side_files(dialect().layouts[0], layers, {});
    const auto map = nlohmann::json::parse(files.texts.at("quanto_qmap.json"));
    EXPECT_EQ(map, nlohmann::json::parse(texts_of(name).at("quanto_qmap.json")));
    EXPECT_EQ(files.metadata.at("format"), "pt");
  }
}

TEST(QuantoLayers, WithoutTheMapTypesFollowFromTheTensors) {
  for (const char* name : {"quanto-int2", "quanto-int4", "quanto-int8", "quanto-float8"}) {
    SCOPED_TRACE(name);
    Golden golden = open_folder(name);
    golden.settings.clear();
    EXPECT_GE(check_layers(golden, expected_of(name)).size(), 14u);
  }
}

TEST(QuantoLayers, GuideFolder) {
  const std::string folder = "layout-quanto-dir";
  const TorchFile file(golden_path("checkpoints/" + folder + "/pytorch_model.bin"));
  Golden golden;
  add_torch(golden, file, file.root());
  golden.settings = dialect().read_settings(texts_of(folder));
  ASSERT_EQ(golden.settings.size(), 1u);
  EXPECT_EQ(golden.settings.begin()->first, "");
  const std::vector<LayerEntry> layers = check_layers(golden, expected_of(folder));
  EXPECT_EQ(layers.size(), 14u);
  const SideFiles files = dialect().side_files(dialect().layouts[1], layers, {});
  const auto config = nlohmann::json::parse(texts_of(folder).at("config.json"));
  EXPECT_EQ(nlohmann::json::parse(files.config_patch).at("quantization_config"),
            config.at("quantization_config"));
}

TEST(QuantoLayers, SingleFile) {
  const TorchFile file(golden_path("checkpoints/layout-quanto-single/quanto_model.pth"));
  const TorchValue* config = file.root().find("quanto_config");
  const TorchValue* state = file.root().find("state_dict");
  ASSERT_TRUE(config != nullptr && state != nullptr);
  const nlohmann::json embedded = {{"bits", config->find("bits")->as_int()},
                                   {"group_size", config->find("group_size")->as_int()}};
  Golden golden;
  add_torch(golden, file, *state);
  golden.settings = dialect().read_settings({{"embedded", embedded.dump()}});
  const std::vector<LayerEntry> layers = check_layers(golden, expected_of("layout-quanto-dir"));
  EXPECT_EQ(layers.size(), 14u);
  const SideFiles files = dialect().side_files(dialect().layouts[2], layers, {});
  EXPECT_EQ(files.embedded_key, "quanto_config");
  nlohmann::json written = nlohmann::json::parse(files.embedded);
  EXPECT_EQ(dialect().read_settings({{"embedded", files.embedded}}).size(), 15u);
  written.erase("modules");  // ours, for shapes that groups hide
  EXPECT_EQ(written, embedded);
}

// ------------------------------------------------------------------ round trips

QuantizeOptions options_of(QuantizationMethod method, DType dtype, const std::string& mode,
                           std::int64_t group, int axis) {
  QuantizeOptions options;
  options.method = method;
  options.value_dtype = dtype;
  options.mode = mode;
  options.group_size = group;
  options.axis = axis;
  return options;
}

Tensor ramp(DType dtype, std::int64_t rows, std::int64_t cols) {
  Tensor out = make_tensor(dtype, {rows, cols});
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>((i * 7919) % 1009) / 512.0F - 1.0F;
  }
  narrow_from_f32(dtype, values.data(), rows * cols, out.bytes.data());
  return out;
}

/// Exports, imports with what the files beside the tensors say, compares everything. The native map
/// leaves the shapes of upstream's modules to the model.
void expect_round_trip(const PackedMatrix& w) {
  const std::vector<LayerEntry> layers = {{"m", w.spec}};
  TensorMap map(dialect().export_layer(w.view(), "m."));
  const SideFiles native = dialect().side_files(dialect().layouts[0], layers, {});
  LayerFacts facts = {.settings = dialect().read_settings(native.texts).at("m")};
  facts.weight_shape = {w.spec.rows, w.spec.cols};
  expect_same_bytes(dialect().import_layer("m.", map.lookup(), facts), w, facts.settings);

  const SideFiles single = dialect().side_files(dialect().layouts[2], layers, {});
  const auto settings = dialect().read_settings({{"embedded", single.embedded}});
  facts = {.settings = settings.at(settings.count("m") != 0 ? "m" : "")};
  expect_same_bytes(dialect().import_layer("m.", map.lookup(), facts), w, facts.settings);
}

TEST(QuantoLayers, EveryFormComesBackWithItsMap) {
  using M = QuantizationMethod;
  const std::vector<std::pair<std::int64_t, std::int64_t>> shapes = {
      {1, 96}, {1, 256}, {2, 160}, {3, 64}, {5, 7}, {6, 1}, {9, 384}, {64, 144}, {96, 40}, {1, 1}};
  int forms = 0;
  for (const auto& [rows, cols] : shapes) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const M method : {M::QUANTO_INT2, M::QUANTO_INT4, M::QUANTO_INT8}) {
        for (const int axis : {0, -1}) {
          for (const char* mode : {"", "zeropoint", "hqq", "hqq,zeropoint"}) {
            if (method == M::QUANTO_INT8 && *mode != 0) continue;
            const Tensor input = ramp(dtype, rows, cols);
            SCOPED_TRACE(shape_string(input.shape) + " " + std::string(method_name(method)) + " " +
                         mode + " axis " + std::to_string(axis));
            expect_round_trip(quantize(input.view(), options_of(method, dtype, mode, 64, axis)));
            ++forms;
          }
        }
      }
    }
  }
  EXPECT_EQ(forms, 10 * 3 * (2 * 4 + 1) * 2);
}

TEST(QuantoLayers, GroupSizeFollowsUpstreamUnlessExact) {
  const std::map<std::int64_t, std::int64_t> rule = {
      {192, 96}, {256, 128},  {160, 32},    {144, 0},   {128, 0}, {64, 0},
      {320, 64}, {4096, 128}, {14336, 128}, {2080, 32}, {130, 0}};
  for (const auto& [length, group] : rule) {
    EXPECT_EQ(quanto::upstream_group_size(length), group) << length;
    const auto options = options_of(QuantizationMethod::QUANTO_INT4, DType::kBF16, "", 64, 0);
    EXPECT_EQ(dialect().make_spec(8, length, options).group_size, group == 0 ? length : group);
  }
  const auto exact =
      options_of(QuantizationMethod::QUANTO_INT4, DType::kBF16, "max,exact_group", 16, 0);
  EXPECT_EQ(dialect().make_spec(8, 256, exact).group_size, 16);
}

TEST(QuantoLayers, ShapesThatGroupsHide) {
  using Shapes = std::vector<std::vector<std::int64_t>>;
  EXPECT_EQ(quanto::possible_shapes(128, 64, 0), (Shapes{{128, 64}}));
  EXPECT_EQ(quanto::possible_shapes(64, 128, 0), (Shapes{{64, 128}, {32, 256}}));
  EXPECT_EQ(quanto::possible_shapes(64, 128, 32), (Shapes{{32, 256}}));
  EXPECT_EQ(quanto::possible_shapes(40, 256, 0), (Shapes{{40, 256}}));
  EXPECT_EQ(quanto::possible_shapes(40, 256, 39), (Shapes{}));

  const Tensor input = ramp(DType::kBF16, 32, 256);
  const PackedMatrix w =
      quantize(input.view(), options_of(QuantizationMethod::QUANTO_INT4, DType::kBF16, "", 64, 0));
  TensorMap map(dialect().export_layer(w.view(), "m."));
  expect_error(Errc::kUnsupported, {"m.weight._scale", "[64, 128] or [32, 256]", "in_features"},
               [&] { dialect().import_layer("m.", map.lookup(), {}); });
  expect_same_bytes(dialect().import_layer("m.", map.lookup(), {.weight_shape = {32, 256}}), w,
                    "shape from the caller");
  map.set("m.bias", make_tensor(DType::kBF16, {32}));
  expect_same_bytes(dialect().import_layer("m.", map.lookup(), {}), w, "shape from the bias");
}

// ------------------------------------------------------------------ residue

TEST(QuantoLayers, KeepsWhatFilesHoldBeyondCodes) {
  const Tensor input = ramp(DType::kF16, 3, 40);
  const PackedMatrix w =
      quantize(input.view(), options_of(QuantizationMethod::QUANTO_INT2, DType::kF16, "", 64, 0));
  TensorMap map(dialect().export_layer(w.view(), "m."));
  map.at("m.weight._data._data").bytes[7] |= 0xC0;                    // row 3 of 3 rows: a pad code
  map.at("m.input_scale").bytes = {0x00, 0x40};                       // 2.0
  map.set("m.output_scale", {DType::kF32, {1}, {0, 0, 0x20, 0x41}});  // 10.0
  const LayerFacts facts = {.settings = R"({"weights": "qint2", "activations": "qint8"})"};
  const PackedMatrix kept = dialect().import_layer("m.", map.lookup(), facts);
  EXPECT_GT(kept.spec.residue_bytes, 0);
  EXPECT_EQ(decode(kept, DType::kF16).bytes, decode(w, DType::kF16).bytes);
  for (const NamedTensor& t : dialect().export_layer(kept.view(), "m.")) {
    EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
    EXPECT_EQ(t.tensor.shape, map.at(t.name).shape) << t.name;
    EXPECT_EQ(t.tensor.dtype, map.at(t.name).dtype) << t.name;
  }
  const std::vector<LayerEntry> layers = {{"m", kept.spec}};
  const SideFiles files = dialect().side_files(dialect().layouts[0], layers, {});
  EXPECT_EQ(nlohmann::json::parse(files.texts.at("quanto_qmap.json")).at("m").at("activations"),
            "qint8");
}

TEST(QuantoLayers, AbsentActivationScalesStayAbsent) {
  const Tensor input = ramp(DType::kF32, 4, 8);
  const PackedMatrix w =
      quantize(input.view(), options_of(QuantizationMethod::QUANTO_INT8, DType::kF32, "", 64, 0));
  TensorMap map(dialect().export_layer(w.view(), ""));
  EXPECT_EQ(map.at("input_scale").bytes, (std::vector<std::uint8_t>{0, 0, 0x80, 0x3F}));
  map.erase("input_scale");
  const PackedMatrix read = dialect().import_layer("", map.lookup(), {});
  std::set<std::string> names;
  for (const NamedTensor& t : dialect().export_layer(read.view(), "")) names.insert(t.name);
  EXPECT_EQ(names, (std::set<std::string>{"weight._data", "weight._scale", "output_scale"}));
}

TEST(QuantoLayers, Float8KeepsUnusualBytesOfZeroScales) {
  TensorMap map;
  map.set("weight._data", {DType::kF8E4M3, {2, 3}, {0x7F, 0x38, 0xFF, 0x38, 0xB8, 0x7F}});
  map.set("weight._scale", {DType::kF32, {2, 1}, {0, 0, 0, 0, 0, 0, 0, 0x40}});
  const PackedMatrix w = dialect().import_layer("", map.lookup(), {});
  const Tensor values = decode(w, DType::kF32);
  const float* v = values.view().data<float>();
  EXPECT_EQ(v[0], 0.0F);
  EXPECT_EQ(v[2], 0.0F);
  EXPECT_EQ(v[3], 2.0F);
  EXPECT_EQ(v[4], -2.0F);
  EXPECT_TRUE(std::isnan(v[5])) << "a scale that is not zero leaves a NaN";
  EXPECT_EQ(tensor_named(dialect().export_layer(w.view(), ""), "weight._data").bytes,
            map.at("weight._data").bytes);
}

// ------------------------------------------------------------------ settings

TEST(QuantoLayers, SettingsOfTransformersAndOthers) {
  const auto settings = [](const std::string& json) {
    return dialect().read_settings({{"config.json", R"({"quantization_config": )" + json + "}"}});
  };
  const auto common = settings(
      R"({"quant_method": "quanto", "weights": "float8", "activations": null,
          "modules_to_not_convert": null})");
  EXPECT_EQ(quanto::parse_layer_settings(common.at(""), "x").weights, quanto::QType::kFloat8E4M3);
  EXPECT_EQ(
      quanto::parse_layer_settings(settings(R"({"quant_method": "quanto", "bits": 2})").at(""), "x")
          .weights,
      quanto::QType::kInt2);
  EXPECT_TRUE(settings(R"({"quant_method": "hqq", "bits": 4})").empty());
  EXPECT_TRUE(dialect().read_settings({{"config.json", "{}"}}).empty());
  expect_error(Errc::kCorrupt, {"config.json", "bits", "3", "2, 4, 8"},
               [&] { settings(R"({"quant_method": "quanto", "bits": 3})"); });
  const auto map = [](const std::string& text) {
    return dialect().read_settings({{"quanto_qmap.json", text}});
  };
  expect_error(Errc::kCorrupt, {"quanto_qmap.json", "a.b", "qint3", "qint4"},
               [&] { map(R"({"a.b": {"weights": "qint3", "activations": "none"}})"); });
  expect_error(Errc::kCorrupt, {"quanto_qmap.json", "JSON"}, [&] { map("[1"); });
  expect_error(Errc::kCorrupt, {"a.b"}, [&] { map(R"({"a.b": 4})"); });
}

TEST(QuantoLayers, MixedWidthsGoToAMapInEveryLayout) {
  const auto spec = [](QuantizationMethod method, std::int64_t cols) {
    return dialect().make_spec(32, cols, options_of(method, DType::kBF16, "", 64, 0));
  };
  const std::vector<LayerEntry> layers = {{"a", spec(QuantizationMethod::QUANTO_INT4, 256)},
                                          {"lm_head", spec(QuantizationMethod::QUANTO_INT8, 64)}};
  const SideFiles native = dialect().side_files(dialect().layouts[0], layers, {});
  EXPECT_EQ(nlohmann::json::parse(native.config_patch).at("tie_word_embeddings"), false);
  const SideFiles guide = dialect().side_files(dialect().layouts[1], layers, {});
  const SideFiles single = dialect().side_files(dialect().layouts[2], layers, {});
  const auto a = dialect().read_settings(guide.texts);
  const auto b = dialect().read_settings({{"embedded", single.embedded}});
  for (const auto& read : {a, b}) {
    EXPECT_EQ(quanto::parse_layer_settings(read.at("a"), "a").weights, quanto::QType::kInt4);
    EXPECT_EQ(quanto::parse_layer_settings(read.at("a"), "a").weight_shape,
              (std::vector<std::int64_t>{32, 256}));
    EXPECT_EQ(quanto::parse_layer_settings(read.at("lm_head"), "b").weights, quanto::QType::kInt8);
  }
}

}  // namespace
}  // namespace quantal::testing

// Settings beside the weights, of every dialect, right and wrong: config.json, quanto_qmap.json,
// hqq_config.json, mlx_config.json, quantization_config.json and quanto_config of a single file.
#include <gtest/gtest.h>

#include <fstream>

#include "formats/layers.h"
#include "support/allocation.h"
#include "support/golden.h"
#include "support/json_damage.h"

namespace quantal::testing {
namespace {

using nlohmann::json;

json golden(const std::string& path) {
  std::ifstream in(golden_path("checkpoints/" + path));
  return json::parse(in);
}

/// A dialect, its file, and a good text for it.
struct Text {
  const char* dialect;
  const char* file;
  json good;
};

std::vector<Text> good_texts() {
  const auto quantization = [](const char* folder, const std::vector<const char*>& keys) {
    const json config = golden(std::string(folder) + "/config.json");
    json out;
    for (const char* key : keys) out[key] = config.at(key);
    return out;
  };
  json map;
  const json whole = golden("quanto-int4/quanto_qmap.json");
  for (const auto& [name, entry] : whole.items()) {
    if (map.size() < 3) map[name] = entry;
  }
  json single = {{"bits", 4}, {"group_size", 128}, {"modules", map}};
  single["modules"].begin().value()["weight_shape"] = {64, 256};
  return {{"bnb", "config.json", quantization("bnb-nf4-double", {"quantization_config"})},
          {"bnb", "config.json", quantization("bnb-int8", {"quantization_config"})},
          {"bnb", "quantization_config.json", golden("layout-bnb-dir/quantization_config.json")},
          {"hqq", "config.json", quantization("hqq-transformers", {"quantization_config"})},
          {"hqq", "hqq_config.json", golden("layout-hqq-dir/hqq_config.json")},
          {"quanto", "config.json", quantization("layout-quanto-dir", {"quantization_config"})},
          {"quanto", "quanto_qmap.json", map},
          {"quanto", "embedded", single},
          {"mlx", "config.json", quantization("mlx-mixed", {"quantization"})},
          {"mlx", "config.json", quantization("mlx-mxfp4", {"quantization_config"})},
          {"mlx", "mlx_config.json", golden("layout-mlx-dir/mlx_config.json")}};
}

std::map<std::string, std::string> read(const Text& text, const std::string& content) {
  return dialect_by_name(text.dialect).read_settings({{text.file, content}});
}

TEST(Settings, GoodTextsAreRead) {
  for (const Text& text : good_texts()) {
    EXPECT_FALSE(read(text, text.good.dump()).empty()) << text.dialect << " " << text.file;
  }
}

TEST(Settings, BrokenTextsAreNamed) {
  for (const Text& text : good_texts()) {
    SCOPED_TRACE(std::string(text.dialect) + " " + text.file);
    for (const std::string& broken : broken_texts(text.good)) {
      SCOPED_TRACE(broken.substr(0, 200));
      const AllocationPeak peak;
      expect_error(Errc::kCorrupt, {text.file, "JSON object"}, [&] { read(text, broken); });
      EXPECT_LE(peak.bytes(), 64 * broken.size() + 65536);
    }
  }
}

/// Whatever stands there, only Error comes out, and it names the file; what is accepted is
/// settings that import_layer can read.
TEST(Settings, OddValuesAreRefusedOrUnderstood) {
  int refused = 0, accepted = 0;
  for (const Text& text : good_texts()) {
    SCOPED_TRACE(std::string(text.dialect) + " " + text.file);
    for (const std::string& odd : with_odd_values(text.good)) {
      SCOPED_TRACE(odd.substr(0, 400));
      try {
        for (const auto& [module, settings] : read(text, odd)) {
          EXPECT_TRUE(json::parse(settings).is_object()) << module;
        }
        ++accepted;
      } catch (const Error& e) {
        ++refused;
        EXPECT_EQ(e.code(), Errc::kCorrupt) << e.what();
      }
    }
  }
  EXPECT_GT(refused, 300);
  EXPECT_GT(accepted, 300);
}

TEST(Settings, NoSettingsAreNoQuantization) {
  const char* const texts[] = {
      "{}", R"({"quantization_config": null})", R"({"quantization": null})",
      R"({"quantization": null, "quantization_config": null, "hidden_size": 64})"};
  for (const Dialect* dialect : dialects()) {
    if (dialect->read_settings == nullptr) continue;
    for (const char* text : texts) {
      EXPECT_TRUE(dialect->read_settings({{"config.json", text}}).empty())
          << dialect->name << " " << text;
    }
    EXPECT_TRUE(dialect->read_settings({}).empty()) << dialect->name;
  }
}

/// Modules that only round activations have "none" for weights; they stay dense.
TEST(Settings, NoneInAQuantoMapSaysNothing) {
  const Dialect& quanto = dialect_by_name("quanto");
  const auto read = quanto.read_settings({{"quanto_qmap.json", R"({
      "norm": {"weights": "none", "activations": "qint8"},
      "head": {"weights": "none", "activations": "none"},
      "plain": {"weights": null},
      "q": {"weights": "qint4", "activations": "none"}})"}});
  ASSERT_EQ(read.size(), 4u);
  EXPECT_EQ(json::parse(read.at("norm")).at("weights"), "none");
  EXPECT_EQ(json::parse(read.at("norm")).at("activations"), "qint8");
  EXPECT_EQ(json::parse(read.at("plain")).at("weights"), "none");
  // A layer of packed tensors says itself what it is.
  Tensor input = make_tensor(DType::kF32, {8, 64});
  QuantizeOptions options;
  options.method = QuantizationMethod::QUANTO_INT4;
  const PackedMatrix w = quantize(input.view(), options);
  TensorMap map(quanto.export_layer(w.view(), "head."));
  LayerFacts facts{.settings = read.at("head")};
  facts.weight_shape = {8, 64};
  expect_same_bytes(quanto.import_layer("head.", map.lookup(), facts), w, "none in the map");
}

}  // namespace
}  // namespace quantal::testing

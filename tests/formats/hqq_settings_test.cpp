// Settings beside HQQ models: what is written is what the packages write, and is read back.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "formats/hqq/hqq_params.h"
#include "formats/layers.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

using nlohmann::json;

const Dialect& hqq_dialect() { return dialect_of(QuantizationMethod::HQQ); }

std::string golden_text(const std::string& path) {
  std::ifstream in(golden_path("checkpoints/" + path));
  return {std::istreambuf_iterator<char>(in), {}};
}

const FileLayout& layout_named(std::string_view name) {
  for (const FileLayout& layout : hqq_dialect().layouts) {
    if (layout.name == name) return layout;
  }
  throw std::runtime_error("no layout " + std::string(name));
}

LayerEntry entry(const std::string& name, int bits, std::int64_t group) {
  QuantizeOptions options;
  options.method = QuantizationMethod::HQQ;
  options.bits = bits;
  options.group_size = group;
  return {name, hqq_dialect().make_spec(64, 64, options)};
}

TEST(HqqSettings, LayoutsOfTheDialect) {
  EXPECT_EQ(hqq_dialect().layouts.front().name, "transformers");
  EXPECT_EQ(layout_named("qmodel").weights, "qmodel.pt");
  EXPECT_EQ(layout_named("qmodel").tree, StateTree::kByModule);
  EXPECT_EQ(layout_named("guide").weights, "hqq_model.pt");
  EXPECT_EQ(layout_named("guide").tree, StateTree::kMetaDict);
  EXPECT_EQ(layout_named("hqq").container, Container::kSafetensors);
}

TEST(HqqSettings, TransformersConfigIsTheirs) {
  const std::vector<LayerEntry> layers = {entry("model.layers.0.self_attn.q_proj", 4, 64),
                                          entry("model.layers.1.self_attn.q_proj", 4, 64)};
  const std::vector<std::string> dense = {"lm_head"};
  const SideFiles files = hqq_dialect().side_files(layout_named("transformers"), layers, dense);
  const json golden = json::parse(golden_text("hqq-transformers/config.json"));
  EXPECT_EQ(json::parse(files.config_patch).at("quantization_config"),
            golden.at("quantization_config"));
  EXPECT_TRUE(files.texts.empty());
}

TEST(HqqSettings, LayersThatDifferGetTags) {
  const std::vector<LayerEntry> layers = {entry("model.layers.0.self_attn.q_proj", 4, 64),
                                          entry("model.layers.0.mlp.up_proj", 2, 16),
                                          entry("model.layers.1.self_attn.q_proj", 4, 64)};
  const SideFiles files = hqq_dialect().side_files(layout_named("transformers"), layers, {});
  const json config = json::parse(files.config_patch).at("quantization_config").at("quant_config");
  ASSERT_EQ(config.size(), 2u);
  EXPECT_EQ(config.at("mlp.up_proj").at("weight_quant_params").at("nbits"), 2);
  EXPECT_EQ(config.at("self_attn.q_proj").at("weight_quant_params").at("group_size"), 64);
  const auto read = hqq_dialect().read_settings(
      {{"config.json",
        json{{"quantization_config", {{"quant_method", "hqq"}, {"quant_config", config}}}}
            .dump()}});
  ASSERT_EQ(read.size(), 1u);
  EXPECT_EQ(read.at(""), "{}");
}

TEST(HqqSettings, PlainLayoutsRemoveTheConfig) {
  for (const char* name : {"hqq", "qmodel", "guide"}) {
    const SideFiles files = hqq_dialect().side_files(layout_named(name), {}, {});
    json config = {{"quantization_config", {{"quant_method", "mlx"}}}, {"hidden_size", 4}};
    config.merge_patch(json::parse(files.config_patch));
    EXPECT_EQ(config, (json{{"hidden_size", 4}})) << name;
  }
}

TEST(HqqSettings, GuideFile) {
  const std::vector<LayerEntry> layers = {entry("a.b", 4, 64)};
  const SideFiles files = hqq_dialect().side_files(layout_named("guide"), layers, {});
  const json written = json::parse(files.texts.at("hqq_config.json"));
  const json golden = json::parse(golden_text("layout-hqq-dir/hqq_config.json"));
  EXPECT_EQ(written.at("weight_quant_params").at("nbits"),
            golden.at("weight_quant_params").at("nbits"));
  EXPECT_EQ(written.at("weight_quant_params").at("group_size"),
            golden.at("weight_quant_params").at("group_size"));
  // The golden file claims quantized zeros that its tensors do not have; ours tells the truth.
  EXPECT_EQ(written.at("weight_quant_params").at("quant_zero"), false);
  const auto read = hqq_dialect().read_settings(files.texts);
  EXPECT_EQ(json::parse(read.at("")).at("nbits"), 4);
}

TEST(HqqSettings, ReadsGoldenFoldersAndOnlyTheirs) {
  const auto read = [](const std::string& folder, const std::string& file) {
    return hqq_dialect().read_settings({{file, golden_text(folder + "/" + file)}});
  };
  EXPECT_EQ(json::parse(read("hqq-transformers", "config.json").at("")).at("group_size"), 64);
  EXPECT_EQ(json::parse(read("layout-hqq-dir", "hqq_config.json").at("")).at("nbits"), 4);
  EXPECT_TRUE(read("hqq-safetensors", "config.json").empty());
  EXPECT_TRUE(read("bnb-nf4", "config.json").empty());
  EXPECT_TRUE(hqq_dialect().read_settings({}).empty());
}

TEST(HqqSettings, DamagedTextsNameFileAndKey) {
  const auto refused = [](const std::string& file, const std::string& text,
                          const std::vector<std::string>& parts) {
    SCOPED_TRACE(text);
    expect_error(Errc::kCorrupt, parts, [&] { hqq_dialect().read_settings({{file, text}}); });
  };
  refused("config.json", "[", {"config.json", "JSON object"});
  refused("hqq_config.json", "{}", {"hqq_config.json", "weight_quant_params"});
  refused("hqq_config.json", R"({"weight_quant_params": {"nbits": "4"}})", {"nbits"});
  const std::string method = R"({"quantization_config": {"quant_method": "hqq", "quant_config": )";
  refused("config.json", method + "3}}", {"quant_config is 3"});
  refused("config.json", method + R"({"mlp.up_proj": {"nbits": 4}}}})",
          {"mlp.up_proj", "weight_quant_params"});
}

}  // namespace
}  // namespace quantal::testing

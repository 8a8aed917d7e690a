// Every golden checkpoint: its values, and that it is the same model after saving.
#include "checkpoint/support.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::golden_path;
using testing::GoldenModel;
using testing::TempFolder;
using testing::view_of;

class GoldenModels : public ::testing::TestWithParam<GoldenModel> {
 protected:
  std::string path() const { return golden_path("checkpoints/" + std::string(GetParam().path)); }
  /// A single file has no config.json: shapes come from the caller, here from upstream's values.
  Checkpoint load(const std::string& from, bool verify = false) const {
    LoadOptions options{.verify_digest = verify};
    options.weight_shape = [](const std::string& module) {
      const json& tensors = testing::expected_values().at(GetParam().expected);
      return tensors.at(module + ".weight").at("shape").get<std::vector<std::int64_t>>();
    };
    if (std::filesystem::is_directory(from)) options.weight_shape = nullptr;
    return load_checkpoint(from, options);
  }
};

TEST_P(GoldenModels, ValuesEqualUpstream) {
  const json& expected = testing::expected_values().at(GetParam().expected);
  const Checkpoint loaded = load(path());
  EXPECT_EQ(loaded.layout, GetParam().layout);
  for (const auto& [name, one] : expected.items()) {
    EXPECT_EQ(testing::sha_of(testing::values_of(loaded, name)),
              one.at("sha256_f32").get<std::string>())
        << name;
  }
  EXPECT_EQ(loaded.layers.size() + loaded.tensors.size(), expected.size());
  EXPECT_EQ(loaded.layers.empty(), std::string(GetParam().path).starts_with("dense"));
}

/// Saved in its own layout it is the same model, settings included.
TEST_P(GoldenModels, SavedAgainIsTheSame) {
  const Checkpoint loaded = load(path());
  const TempFolder temp;
  const bool single = loaded.layout.ends_with("single");
  const std::string saved = temp.path(single ? "saved.pth" : "saved");
  save_checkpoint(saved, view_of(loaded), {.layout = loaded.layout});
  const Checkpoint again = load(saved, true);
  EXPECT_EQ(again.layout, loaded.layout);
  const std::string digest = checkpoint_digest(view_of(loaded));
  EXPECT_EQ(checkpoint_digest(view_of(again)), digest);
  if (single) return;
  EXPECT_EQ(json::parse(read_text_file(saved + "/quantal.json")).at("digest"), digest);
  const json before = json::parse(loaded.config_json), after = json::parse(again.config_json);
  for (const auto& [key, value] : before.items()) EXPECT_TRUE(after.contains(key)) << key;
}

/// Tensors of a safetensors folder that upstream wrote come back byte for byte.
TEST_P(GoldenModels, SafetensorsBytesReturn) {
  if (!fs::exists(path() + "/model.safetensors")) return;
  const Checkpoint loaded = load(path());
  const TempFolder temp;
  save_checkpoint(temp.path("saved"), view_of(loaded), {.layout = loaded.layout});
  const SafetensorsFile ours(temp.path("saved/model.safetensors"));
  const SafetensorsFile upstream(path() + "/model.safetensors");
  std::size_t compared = 0;
  for (const auto& [name, tensor] : upstream.tensors()) {
    SCOPED_TRACE(name);
    const TensorView* same = ours.find(name);
    ASSERT_NE(same, nullptr);
    EXPECT_EQ(same->shape, tensor.shape);
    EXPECT_EQ(dtype_name(same->dtype), dtype_name(tensor.dtype));
    EXPECT_TRUE(std::equal(same->bytes.begin(), same->bytes.end(), tensor.bytes.begin(),
                           tensor.bytes.end()));
    ++compared;
  }
  EXPECT_EQ(compared, ours.tensors().size());
  for (const auto& [key, value] : upstream.metadata()) EXPECT_EQ(ours.metadata().at(key), value);
}

/// In every other layout of its dialect it is the same model too.
TEST_P(GoldenModels, EveryLayoutHoldsIt) {
  const Checkpoint loaded = load(path());
  const Dialect* dialect =
      loaded.layers.empty() ? nullptr : &dialect_by_id(loaded.layers.begin()->second.spec.dialect);
  const TempFolder temp;
  for (const FileLayout& layout : file_layouts(dialect)) {
    SCOPED_TRACE(layout.name);
    if (layout.container == Container::kGguf) continue;
    const std::string saved = temp.path(std::string(layout.name));
    const SaveOptions options{.layout = std::string(layout.name)};
    try {
      save_checkpoint(saved, view_of(loaded), options);
    } catch (const Error& e) {  // a layout may say that it cannot hold such layers
      EXPECT_EQ(e.code(), Errc::kUnsupported) << e.what();
      EXPECT_FALSE(fs::exists(saved));
      continue;
    }
    const Checkpoint again = load(saved);
    // A layout may have no place for a dialect's remarks (HQQ's settings of the quantizer), but
    // codes, statistics and values are the same.
    ASSERT_EQ(again.layers.size(), loaded.layers.size());
    for (const auto& [name, layer] : loaded.layers) {
      EXPECT_EQ(again.layers.at(name).codes, layer.codes) << name;
      EXPECT_EQ(again.layers.at(name).stats, layer.stats) << name;
      EXPECT_TRUE(testing::values_of(again, name + ".weight") ==
                  testing::values_of(loaded, name + ".weight"));
    }
    EXPECT_EQ(again.tensors.size(), loaded.tensors.size());
    EXPECT_EQ(again.layout.substr(again.layout.find(' ') + 1), layout.name);
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenModels, ::testing::ValuesIn(testing::kFolderModels),
                         [](const auto& info) {
                           std::string name = info.param.path;
                           for (char& c : name) {
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace quantal

// Every golden checkpoint: its values, and that it is the same model after saving.
#include "checkpoint/support.h"
#include "checkpoint/tensor_set.h"
#include "quantal/archive.h"

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
  bool gguf() const { return path().ends_with(".gguf"); }
  /// Upstream's single file does not tell the shapes of its weights: they come from the caller,
  /// here from upstream's values. What quantal saves tells everything.
  Checkpoint load_golden() const {
    LoadOptions options;
    if (std::string(GetParam().layout) == "quanto single") {
      options.weight_shape = [](const std::string& module) {
        const json& tensors = testing::expected_values().at(GetParam().expected);
        return tensors.at(module + ".weight").at("shape").get<std::vector<std::int64_t>>();
      };
    }
    return load_checkpoint(path(), options);
  }
};

TEST_P(GoldenModels, ValuesEqualUpstream) {
  const json& expected = testing::expected_values().at(GetParam().expected);
  const Checkpoint loaded = load_golden();
  EXPECT_EQ(loaded.layout, GetParam().layout);
  for (const auto& [name, one] : expected.items()) {
    EXPECT_EQ(testing::sha_of(testing::values_of(loaded, name)),
              one.at("sha256_f32").get<std::string>())
        << name;
  }
  EXPECT_EQ(loaded.layers.size() + loaded.tensors.size(), expected.size());
  EXPECT_EQ(loaded.layers.empty(), std::string(GetParam().layout).starts_with("dense"));
}

/// Saved in its own layout it is the same model, settings included.
TEST_P(GoldenModels, SavedAgainIsTheSame) {
  const Checkpoint loaded = load_golden();
  const TempFolder temp;
  const bool single = loaded.layout.ends_with("single") || gguf();
  const std::string saved = temp.path("saved");
  save_checkpoint(saved, view_of(loaded), {.layout = loaded.layout});
  const Checkpoint again = load_checkpoint(saved, {.verify_digest = true});
  EXPECT_EQ(again.layout, loaded.layout);
  const std::string digest = checkpoint_digest(view_of(loaded));
  EXPECT_EQ(checkpoint_digest(view_of(again)), digest);
  if (single) return;
  EXPECT_EQ(json::parse(read_text_file(saved + "/quantal.json")).at("digest"), digest);
  const json before = json::parse(loaded.config_json), after = json::parse(again.config_json);
  for (const auto& [key, value] : before.items()) EXPECT_TRUE(after.contains(key)) << key;
}

/// Whatever upstream wrote, in safetensors, torch or npz files, comes back byte for byte under the
/// same names; in torch files also numbers, texts, types and sizes as what they were.
TEST_P(GoldenModels, BytesReturn) {
  if (gguf()) return;  // gguf_model_test
  const Checkpoint loaded = load_golden();
  const TempFolder temp;
  save_checkpoint(temp.path("saved"), view_of(loaded), {.layout = loaded.layout});
  const auto upstream = checkpoint::open_tensor_set(path());
  const auto ours = checkpoint::open_tensor_set(temp.path("saved"));
  EXPECT_EQ(ours.tree, upstream.tree);
  EXPECT_EQ(ours.tensors.size(), upstream.tensors.size());
  for (const auto& [name, tensor] : upstream.tensors) {
    SCOPED_TRACE(name);
    const auto same = ours.tensors.find(name);
    ASSERT_NE(same, ours.tensors.end());
    EXPECT_EQ(same->second.kind, tensor.kind);
    EXPECT_EQ(same->second.shape, tensor.shape);
    EXPECT_EQ(dtype_name(same->second.dtype), dtype_name(tensor.dtype));
    const HeldTensor a = tensor.read(), b = same->second.read();
    EXPECT_TRUE(std::equal(a.view.bytes.begin(), a.view.bytes.end(), b.view.bytes.begin(),
                           b.view.bytes.end()));
  }
  for (const auto& [key, value] : upstream.metadata) EXPECT_EQ(ours.metadata.at(key), value);
}

/// In every other layout of its dialect it is the same model too.
TEST_P(GoldenModels, EveryLayoutHoldsIt) {
  const Checkpoint loaded = load_golden();
  const Dialect* dialect =
      loaded.layers.empty() ? nullptr : &dialect_by_id(loaded.layers.begin()->second.spec.dialect);
  const TempFolder temp;
  for (const FileLayout& layout : file_layouts(dialect)) {
    SCOPED_TRACE(layout.name);
    const std::string saved = temp.path(std::string(layout.name));
    save_checkpoint(saved, view_of(loaded), {.layout = std::string(layout.name)});
    const Checkpoint again = load_checkpoint(saved);
    // A layout may have no place for a dialect's remarks (HQQ's settings of the quantizer), but
    // codes, statistics and values are the same.
    ASSERT_EQ(again.layers.size(), loaded.layers.size());
    for (const auto& [name, layer] : loaded.layers) {
      EXPECT_EQ(again.layers.at(name).codes, layer.codes) << name;
      EXPECT_EQ(again.layers.at(name).stats, layer.stats) << name;
      EXPECT_TRUE(testing::values_of(again, name + ".weight") ==
                  testing::values_of(loaded, name + ".weight"));
    }
    ASSERT_EQ(again.tensors.size(), loaded.tensors.size());
    for (const auto& [name, tensor] : loaded.tensors) {
      const TensorView& same = again.tensors.at(name);
      EXPECT_EQ(same.shape, tensor.shape) << name;
      if (layout.container == Container::kGguf) {  // vectors are float32 there
        EXPECT_TRUE(testing::values_of(again, name) == testing::values_of(loaded, name)) << name;
        continue;
      }
      EXPECT_EQ(dtype_name(same.dtype), dtype_name(tensor.dtype)) << name;
      EXPECT_TRUE(std::equal(same.bytes.begin(), same.bytes.end(), tensor.bytes.begin(),
                             tensor.bytes.end()))
          << name;
    }
    EXPECT_EQ(again.layout.substr(again.layout.find(' ') + 1), layout.name);
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenModels, ::testing::ValuesIn(testing::kGoldenModels),
                         [](const auto& info) {
                           std::string name = info.param.path;
                           for (char& c : name) {
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace quantal

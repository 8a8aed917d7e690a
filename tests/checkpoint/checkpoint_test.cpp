#include "quantal/checkpoint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/sha256.h"
#include "io/temp_folder.h"
#include "support/golden.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::golden_path;
using testing::TempFolder;

CheckpointView view_of(const Checkpoint& checkpoint) {
  CheckpointView view;
  view.config_json = checkpoint.config_json;
  for (const auto& [name, layer] : checkpoint.layers) view.layers.emplace_back(name, layer.view());
  for (const auto& [name, tensor] : checkpoint.tensors) view.tensors.emplace_back(name, tensor);
  const json config = json::parse(checkpoint.config_json);
  if (config.contains("quantization_config")) {
    view.quantization_config_json = config.at("quantization_config").dump();
  } else if (!view.layers.empty()) {
    view.quantization_config_json = R"({"quant_method":"hqq"})";
  }
  return view;
}

/// SHA-256 of a layer's or tensor's values in float32.
std::string digest_of_values(const Checkpoint& checkpoint, const std::string& tensor) {
  std::vector<float> values;
  const std::string module = tensor.substr(0, tensor.rfind('.'));
  const auto layer = checkpoint.layers.find(module);
  if (layer != checkpoint.layers.end() && tensor.ends_with(".weight")) {
    const PackedSpec& spec = layer->second.spec;
    values.resize(static_cast<std::size_t>(spec.rows * spec.cols));
    dequantize(layer->second.view(), {0, spec.rows, 0, spec.cols}, DType::kF32, values.data(),
               spec.cols, serial_executor());
  } else {
    const TensorView& view = checkpoint.tensors.at(tensor);
    values.resize(static_cast<std::size_t>(view.numel()));
    widen_to_f32(view.dtype, view.bytes.data(), view.numel(), values.data());
  }
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * 4});
  return hash.hex();
}

class GoldenFolder : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenFolder, ValuesEqualUpstream) {
  std::ifstream in(golden_path("vectors/checkpoint_expected.json"));
  const json expected = json::parse(in).at(GetParam());
  const Checkpoint loaded = load_checkpoint(golden_path("checkpoints/" + std::string(GetParam())));
  for (const auto& [name, one] : expected.items()) {
    EXPECT_EQ(digest_of_values(loaded, name), one.at("sha256_f32").get<std::string>()) << name;
  }
  EXPECT_EQ(loaded.layers.size() + loaded.tensors.size(), expected.size());
}

TEST_P(GoldenFolder, SavingAndLoadingKeepsEveryTensor) {
  const std::string source = golden_path("checkpoints/" + std::string(GetParam()));
  const Checkpoint loaded = load_checkpoint(source);
  const TempFolder temp;
  const std::string saved = temp.path("saved");
  save_checkpoint(saved, view_of(loaded));

  const Checkpoint again = load_checkpoint(saved);
  EXPECT_EQ(checkpoint_digest(view_of(again)), checkpoint_digest(view_of(loaded)));
  const json marker = json::parse(read_text_file(saved + "/quantal.json"));
  EXPECT_EQ(marker.at("digest"), checkpoint_digest(view_of(loaded)));
  const SafetensorsFile file(saved + "/model.safetensors");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  if (!fs::exists(source + "/model.safetensors")) return;
  // The tensors of a folder that upstream wrote come back byte for byte.
  const SafetensorsFile upstream(source + "/model.safetensors");
  std::size_t compared = 0;
  for (const auto& [name, tensor] : upstream.tensors()) {
    SCOPED_TRACE(name);
    const TensorView* ours = file.find(name);
    ASSERT_NE(ours, nullptr);
    EXPECT_EQ(ours->shape, tensor.shape);
    EXPECT_EQ(dtype_name(ours->dtype), dtype_name(tensor.dtype));
    EXPECT_TRUE(std::equal(ours->bytes.begin(), ours->bytes.end(), tensor.bytes.begin(),
                           tensor.bytes.end()));
    ++compared;
  }
  EXPECT_EQ(compared, file.tensors().size());
}

INSTANTIATE_TEST_SUITE_P(Folders, GoldenFolder,
                         ::testing::Values("bnb-nf4", "bnb-nf4-double", "bnb-fp4-f16",
                                           "bnb-nf4-storage-bf16", "hqq-transformers",
                                           "hqq-safetensors", "dense-bf16", "dense-bf16-sharded"));

class CheckpointFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    weight_ = make_tensor(DType::kF32, {2, 2});
    view_.config_json = R"({"model_type":"llama","quantization_config":{"stale":1}})";
    view_.tensors.emplace_back("a.weight", weight_.view());
  }
  Errc code_of_save(const std::string& folder, bool overwrite = false) {
    try {
      save_checkpoint(folder, view_, overwrite);
    } catch (const Error& e) {
      return e.code();
    }
    return Errc::kInternal;
  }
  std::size_t entries(const std::string& folder) {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), {}));
  }
  TempFolder temp_;
  Tensor weight_;
  CheckpointView view_;
};

TEST_F(CheckpointFolder, DenseConfigPromisesNoQuantization) {
  save_checkpoint(temp_.path("m"), view_);
  const json config = json::parse(read_text_file(temp_.path("m/config.json")));
  EXPECT_EQ(config, json({{"model_type", "llama"}}));
  EXPECT_EQ(entries(temp_.path()), 1u);  // no temporary folder stays
}

TEST_F(CheckpointFolder, ReplacesOnlyItsOwnFolders) {
  const std::string folder = temp_.path("m");
  save_checkpoint(folder, view_);
  std::ofstream(folder + "/tokenizer.json") << "{}";
  std::ofstream(folder + "/model-00001-of-00002.safetensors") << "stale";
  weight_.bytes[0] = 1;
  save_checkpoint(folder, view_);  // ours: no overwrite needed
  EXPECT_EQ(load_checkpoint(folder).tensors.at("a.weight").bytes[0], 1);
  EXPECT_TRUE(fs::exists(folder + "/tokenizer.json"));
  EXPECT_FALSE(fs::exists(folder + "/model-00001-of-00002.safetensors"));
  EXPECT_EQ(entries(temp_.path()), 1u);

  const std::string foreign = temp_.path("foreign");
  fs::create_directory(foreign);
  save_checkpoint(foreign + "/", view_);  // an empty folder is nobody's
  fs::remove(foreign + "/quantal.json");
  std::ofstream(foreign + "/model.safetensors") << "precious";
  EXPECT_EQ(code_of_save(foreign), Errc::kConfig);
  EXPECT_EQ(read_text_file(foreign + "/model.safetensors"), "precious");
  EXPECT_EQ(code_of_save(foreign, true), Errc::kInternal);
  EXPECT_TRUE(fs::exists(foreign + "/quantal.json"));
  EXPECT_EQ(entries(temp_.path()), 2u);
}

TEST_F(CheckpointFolder, FailureLeavesEverythingAsItWas) {
  const std::string folder = temp_.path("m");
  save_checkpoint(folder, view_);
  view_.tensors.emplace_back("a.weight", weight_.view());  // a duplicate name
  EXPECT_EQ(code_of_save(folder), Errc::kConfig);
  EXPECT_EQ(load_checkpoint(folder).tensors.size(), 1u);
  view_.tensors.pop_back();
  view_.config_json = "[]";
  EXPECT_EQ(code_of_save(folder), Errc::kCorrupt);
  EXPECT_EQ(entries(temp_.path()), 1u);
  view_.config_json = "{}";
  std::ofstream(temp_.path("file")) << "x";
  EXPECT_EQ(code_of_save(temp_.path("file")), Errc::kIo);
  EXPECT_EQ(code_of_save(temp_.path("file/below")), Errc::kIo);
  EXPECT_EQ(code_of_save(temp_.path("no/parent")), Errc::kIo);
}

TEST_F(CheckpointFolder, QuantizedLayersNeedTheirConfig) {
  const Checkpoint loaded = load_checkpoint(golden_path("checkpoints/bnb-nf4"));
  view_ = view_of(loaded);
  view_.quantization_config_json.clear();
  EXPECT_EQ(code_of_save(temp_.path("m")), Errc::kConfig);
  EXPECT_EQ(entries(temp_.path()), 0u);
}

TEST_F(CheckpointFolder, DigestSeesNamesSpecsAndBytes) {
  const std::string base = checkpoint_digest(view_);
  EXPECT_EQ(checkpoint_digest(view_), base);
  weight_.bytes[5] ^= 1;
  EXPECT_NE(checkpoint_digest(view_), base);
  weight_.bytes[5] ^= 1;
  view_.tensors[0].first = "b.weight";
  EXPECT_NE(checkpoint_digest(view_), base);
  view_.tensors[0].first = "a.weight";
  view_.tensors[0].second.shape = {4, 1};
  EXPECT_NE(checkpoint_digest(view_), base);
  view_.tensors[0].second.shape = {2, 2};
  view_.config_json = "{}";  // settings are not part of the model's bytes
  EXPECT_EQ(checkpoint_digest(view_), base);

  const Tensor other = make_tensor(DType::kF32, {1});
  CheckpointView two = view_, reversed = view_;
  two.tensors = {{"a", weight_.view()}, {"b", other.view()}};
  reversed.tensors = {{"b", other.view()}, {"a", weight_.view()}};
  EXPECT_EQ(checkpoint_digest(two), checkpoint_digest(reversed));
}

/// A copy of a golden folder whose tensors a test may change.
class Damaged : public ::testing::Test {
 protected:
  using Tensors = std::vector<std::pair<std::string, TensorView>>;

  Error error_of(const std::string& source, const std::function<void(Tensors&)>& damage) {
    const SafetensorsFile file(golden_path("checkpoints/" + source + "/model.safetensors"));
    Tensors tensors = file.tensors();
    damage(tensors);
    write_safetensors(temp_.path("model.safetensors"), tensors, file.metadata());
    try {
      load_checkpoint(temp_.path());
    } catch (const Error& e) {
      EXPECT_NE(e.site().path.find(temp_.path()), std::string::npos) << e.what();
      return e;
    }
    ADD_FAILURE() << "accepted";
    return Error(Errc::kInternal, "accepted");
  }

  static void erase(Tensors& tensors, const std::string& name) {
    std::erase_if(tensors, [&](const auto& tensor) { return tensor.first == name; });
  }
  TempFolder temp_;
};

TEST_F(Damaged, MissingExtraAndMisshapenTensorsAreNamed) {
  const std::string q = "model.layers.0.self_attn.q_proj.";
  const Error missing = error_of("hqq-transformers", [&](Tensors& t) { erase(t, q + "shape"); });
  EXPECT_NE(std::string(missing.what()).find(q + "shape"), std::string::npos) << missing.what();

  const Tensor byte = make_tensor(DType::kU8, {1});
  const Error extra = error_of("hqq-transformers", [&](Tensors& t) {
    t.emplace_back(q + "surprise", byte.view());
    t.emplace_back(q + "weight", byte.view());
  });
  EXPECT_EQ(extra.code(), Errc::kCorrupt);
  EXPECT_NE(std::string(extra.what()).find(q + "surprise, " + q + "weight"), std::string::npos)
      << extra.what();

  const Error short_codes = error_of("bnb-nf4", [&](Tensors& t) {
    for (auto& [name, view] : t) {
      if (name != q + "weight") continue;
      view.shape = {view.shape[0] - 1, 1};
      view.bytes = view.bytes.first(view.bytes.size() - 1);
    }
  });
  EXPECT_EQ(short_codes.site().tensor, q + "weight") << short_codes.what();
  const Error no_map = error_of("bnb-nf4", [&](Tensors& t) { erase(t, q + "weight.absmax"); });
  EXPECT_NE(std::string(no_map.what()).find(q + "weight.absmax"), std::string::npos)
      << no_map.what();
}

TEST(Load, ForeignQuantizationIsRefusedNotTakenForDense) {
  const std::pair<const char*, const char*> cases[] = {
      {"quanto-int4", "quanto"}, {"mlx-4bit", "mlx"}, {"bnb-int8", "bitsandbytes"}};
  for (const auto& [folder, method] : cases) {
    try {
      load_checkpoint(golden_path("checkpoints/" + std::string(folder)));
      ADD_FAILURE() << folder;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::kUnsupported) << folder;
      EXPECT_NE(std::string(e.what()).find(method), std::string::npos) << e.what();
    }
  }
  EXPECT_THROW(load_checkpoint(golden_path("checkpoints/gguf/tiny-q4_0.gguf")), Error);
  try {
    load_checkpoint(golden_path("checkpoints/hqq-pt-4bit"));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::kIo);
    EXPECT_NE(std::string(e.what()).find("No checkpoint found in"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("qmodel.pt"), std::string::npos);
  }
}

TEST(Load, SingleFileAndUnalignedData) {
  const Checkpoint single =
      load_checkpoint(golden_path("checkpoints/hqq-safetensors/model.safetensors"));
  EXPECT_GT(single.layers.size(), 0u);
  const Checkpoint odd =
      load_checkpoint(golden_path("containers/odd_unaligned_header.safetensors"));
  ASSERT_EQ(odd.tensors.size(), 1u);
  const TensorView& view = odd.tensors.begin()->second;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.bytes.data()) % dtype_size(view.dtype), 0u);
}

}  // namespace
}  // namespace quantal

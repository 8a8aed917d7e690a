// Saving, damaged input, single files.
#include "checkpoint/support.h"
#include "quantal/archive.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::golden_path;
using testing::TempFolder;
using testing::view_of;

class CheckpointFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    weight_ = make_tensor(DType::kF32, {2, 2});
    view_.config_json = R"({"model_type":"llama","quantization_config":{"stale":1}})";
    view_.tensors.emplace_back("a.weight", weight_.view());
  }
  Errc code_of_save(const std::string& folder, bool overwrite = false) {
    try {
      save_checkpoint(folder, view_, {.overwrite = overwrite});
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
  save_checkpoint(temp_.path("new/parents/folder"), view_);
  EXPECT_EQ(load_checkpoint(temp_.path("new/parents/folder")).tensors.size(), 1u);
}

TEST_F(CheckpointFolder, LayersOfTwoDialectsAreRefused) {
  const Checkpoint bnb = load_checkpoint(golden_path("checkpoints/bnb-nf4"));
  const Checkpoint hqq = load_checkpoint(golden_path("checkpoints/hqq-transformers"));
  view_ = view_of(bnb);
  view_.layers.emplace_back("other", hqq.layers.begin()->second.view());
  EXPECT_EQ(code_of_save(temp_.path("m")), Errc::kConfig);
  EXPECT_EQ(entries(temp_.path()), 0u);
}

/// hqq asks for the tied output layer by name; here it is one tensor with the embedding.
TEST_F(CheckpointFolder, TiedHeadsOfHqqShareTheBytesOfTheEmbedding) {
  const Checkpoint golden = load_checkpoint(golden_path("checkpoints/hqq-pt-4bit"));
  view_ = view_of(golden);
  std::erase_if(view_.tensors, [](const auto& one) { return one.first == "lm_head.weight"; });
  json config = json::parse(golden.config_json);
  for (const bool tied : {true, false}) {
    SCOPED_TRACE(tied);
    config["tie_word_embeddings"] = tied;
    view_.config_json = config.dump();
    save_checkpoint(temp_.path("m"), view_, {.layout = "qmodel"});
    const TorchFile file(temp_.path("m/qmodel.pt"));
    const TorchValue* head = file.root().find("lm_head");
    ASSERT_EQ(head != nullptr, tied);
    if (tied) {
      const TorchValue* embedding = file.root().find("model.embed_tokens");
      EXPECT_EQ(head->find("weight")->as_tensor().storage,
                embedding->find("weight")->as_tensor().storage);
    }
    const Checkpoint again = load_checkpoint(temp_.path("m"), {.verify_digest = true});
    EXPECT_FALSE(again.tensors.contains("lm_head.weight"));
    EXPECT_EQ(again.tensors.size(), view_.tensors.size());
  }
}

/// transformers' torch files name the tied head, in their index too.
TEST_F(CheckpointFolder, TiedHeadsOfShardedTorchFiles) {
  const fs::path folder = temp_.path("m");
  fs::create_directory(folder);
  {
    TorchWriter writer((folder / "pytorch_model-00001-of-00001.bin").string());
    const TorchTensor tensor = writer.add(weight_.view());
    TorchValue::Pairs pairs;
    for (const char* name : {"model.embed_tokens.weight", "lm_head.weight", "other.weight"}) {
      pairs.emplace_back(TorchValue::text(name), TorchValue::tensor(tensor));
    }
    writer.finish(TorchValue::ordered_dict(std::move(pairs)));
  }
  const std::string file = "pytorch_model-00001-of-00001.bin";
  const json map = {{"model.embed_tokens.weight", file}, {"lm_head.weight", file}};
  std::ofstream(folder / "pytorch_model.bin.index.json") << json{{"weight_map", map}};
  std::ofstream(folder / "config.json") << "{}";
  const Checkpoint read = load_checkpoint(folder.string());
  ASSERT_EQ(read.tensors.size(), 1u);
  EXPECT_EQ(read.tensors.begin()->first, "model.embed_tokens.weight");
}

/// Numbers are float32 in packed layers and Python's floats in torch files: 1.58 stays 1.58.
TEST_F(CheckpointFolder, NumbersOfTorchFilesAreTheShortest) {
  Tensor weight = make_tensor(DType::kF32, {8, 64});
  for (std::size_t i = 0; i < weight.bytes.size(); i += 4)
    weight.bytes[i + 3] = i % 3 == 0 ? 63 : 0;
  QuantizeOptions options{.method = QuantizationMethod::HQQ, .bits = 2, .group_size = 64};
  options.mode = "1.58";
  const PackedMatrix layer =
      quantize(weight.view(), dialect_by_name("hqq"), options, serial_executor());
  view_.layers.emplace_back("layer", layer.view());
  save_checkpoint(temp_.path("m"), view_, {.layout = "qmodel"});
  const TorchFile file(temp_.path("m/qmodel.pt"));
  EXPECT_EQ(file.root().find("layer")->find("nbits")->as_float(), 1.58);
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

/// A single file of safetensors or npz needs nothing beside it: config.json and the settings of the
/// layers are inside. The suffix chooses it.
TEST(Save, SingleFilesCarryTheirSettings) {
  for (const char* model : {"bnb-nf4-double", "hqq-pt-3bit-axis0", "mlx-mixed", "mlx-mxfp4",
                            "quanto-int4", "dense-bf16"}) {
    const Checkpoint source = load_checkpoint(golden_path("checkpoints/" + std::string(model)));
    const bool npz = std::string(model).starts_with("mlx") || source.layers.empty();
    for (const char* suffix : {".safetensors", ".npz"}) {
      if (std::string(suffix) == ".npz" && !npz) continue;
      SCOPED_TRACE(std::string(model) + suffix);
      const TempFolder temp;
      const std::string path = temp.path(std::string("m") + suffix);
      save_checkpoint(path, view_of(source));
      const Checkpoint again = load_checkpoint(path);
      EXPECT_TRUE(again.layout.find(" single") != std::string::npos) << again.layout;
      EXPECT_EQ(checkpoint_digest(view_of(again)), checkpoint_digest(view_of(source)));
      const auto before = nlohmann::json::parse(source.config_json),
                 after = nlohmann::json::parse(again.config_json);
      for (const char* key : {"model_type", "hidden_size", "num_hidden_layers", "vocab_size"}) {
        EXPECT_EQ(before.at(key), after.at(key)) << key;
      }
    }
  }
}

TEST(Save, SettingsThatDoNotFitIntoAnNpzFileAreRefused) {
  const Checkpoint source = load_checkpoint(golden_path("checkpoints/mlx-4bit"));
  const TempFolder temp;
  CheckpointView view = view_of(source);
  auto config = nlohmann::json::parse(source.config_json);
  config["remarks"] = std::string(70000, 'x');
  view.config_json = config.dump();
  const Error error = testing::error_of([&] { save_checkpoint(temp.path("m.npz"), view); });
  EXPECT_EQ(error.code(), Errc::kUnsupported) << error.what();
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
  save_checkpoint(temp.path("m"), view, {.layout = "npz"});
  EXPECT_EQ(load_checkpoint(temp.path("m")).layers.size(), source.layers.size());
}

TEST(Load, CommentsOfOtherProgramsAreIgnored) {
  const TempFolder temp;
  const Tensor one = make_tensor(DType::kF32, {2, 3});
  for (const char* comment : {"made by hand", "{\"quantal_texts\"", "{\"other\": {}}"}) {
    NpzWriter writer(temp.path("x.npz"));
    writer.put("w", one.view());
    writer.finish(comment);
    const Checkpoint loaded = load_checkpoint(temp.path("x.npz"));
    EXPECT_EQ(loaded.config_json, "{}");
    EXPECT_EQ(loaded.tensors.size(), 1u);
  }
  for (const char* comment :
       {"{\"quantal_texts\":", "{\"quantal_texts\":{\"config.json\": \"[\"}}"}) {
    NpzWriter writer(temp.path("x.npz"));
    writer.put("w", one.view());
    writer.finish(comment);
    EXPECT_EQ(testing::error_of([&] { load_checkpoint(temp.path("x.npz")); }).code(),
              Errc::kCorrupt);
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

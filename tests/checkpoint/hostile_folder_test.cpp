// Folders of upstream whose settings or index say something else: a typed error that names the
// file, or a model; never anything worse.
#include "checkpoint/support.h"
#include "quantal/archive.h"
#include "support/allocation.h"
#include "support/json_damage.h"

namespace quantal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::AllocationPeak;
using testing::golden_path;
using testing::TempFolder;

/// A golden folder, one file of which is another.
class HostileFolder : public ::testing::Test {
 protected:
  void use(const std::string& golden) {
    folder_ = std::make_unique<TempFolder>();
    for (const auto& entry : fs::directory_iterator(golden_path("checkpoints/" + golden))) {
      fs::create_symlink(fs::absolute(entry.path()), folder_->path(entry.path().filename()));
    }
  }
  json read(const std::string& file) const {
    return json::parse(read_text_file(folder_->path(file)));
  }
  void write(const std::string& file, const std::string& text) const {
    fs::remove(folder_->path(file));
    std::ofstream(folder_->path(file), std::ios::binary) << text;
  }
  /// True if it loads; else the error must be typed and say where.
  bool loads() const {
    try {
      const Checkpoint loaded = load_checkpoint(folder_->path());
      EXPECT_FALSE(loaded.layers.empty() && loaded.tensors.empty());
      return true;
    } catch (const Error& e) {
      EXPECT_NE(errc_name(e.code()), errc_name(Errc::kInternal)) << e.what();
      EXPECT_FALSE(e.site().path.empty()) << e.what();
      return false;
    }
  }
  void expect_corrupt(const std::string& file, const std::string& text) const {
    write(file, text);
    const AllocationPeak peak;
    const Error e = testing::error_of([&] { load_checkpoint(folder_->path()); });
    EXPECT_EQ(errc_name(e.code()), errc_name(Errc::kCorrupt)) << e.what();
    EXPECT_NE(e.site().path.find(file), std::string::npos) << e.what();
    EXPECT_LE(peak.bytes(), 64 * text.size() + (4u << 20));
  }

  std::unique_ptr<TempFolder> folder_;
};

struct Settings {
  const char* folder;
  const char* file;
  std::vector<const char*> keys;  ///< that are changed; empty: all
};

const std::vector<Settings>& settings() {
  static const std::vector<Settings> kAll = {
      {"bnb-nf4-double", "config.json", {"quantization_config"}},
      {"bnb-int8", "config.json", {"quantization_config"}},
      {"layout-bnb-dir", "quantization_config.json", {}},
      {"hqq-transformers", "config.json", {"quantization_config"}},
      {"layout-hqq-dir", "hqq_config.json", {}},
      {"layout-quanto-dir",
       "config.json",
       {"quantization_config", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size"}},
      {"quanto-int4", "quanto_qmap.json", {}},
      {"mlx-4bit", "config.json", {"quantization", "quantization_config"}},
      {"mlx-mxfp4", "config.json", {"quantization", "torch_dtype", "dtype"}},
      {"mlx-npz", "config.json", {"quantization"}},
      {"layout-mlx-dir", "mlx_config.json", {}},
  };
  return kAll;
}

TEST_F(HostileFolder, OddSettings) {
  int refused = 0, loaded = 0;
  for (const Settings& one : settings()) {
    SCOPED_TRACE(std::string(one.folder) + "/" + one.file);
    use(one.folder);
    const json whole = read(one.file);
    json part;
    for (const char* key : one.keys) {
      if (whole.contains(key)) part[key] = whole.at(key);
    }
    if (one.keys.empty()) {
      for (const auto& [key, value] : whole.items()) {
        if (part.size() < 3) part[key] = value;
      }
    }
    EXPECT_TRUE(loads());
    for (const std::string& odd : testing::with_odd_values(part)) {
      SCOPED_TRACE(odd.substr(0, 300));
      json text = whole;
      for (const auto& [key, value] : part.items()) text.erase(key);
      text.update(json::parse(odd));
      write(one.file, text.dump());
      (loads() ? loaded : refused) += 1;
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(refused, 300);
  EXPECT_GT(loaded, 100);
}

TEST_F(HostileFolder, BrokenSettings) {
  for (const Settings& one : settings()) {
    SCOPED_TRACE(std::string(one.folder) + "/" + one.file);
    use(one.folder);
    const auto texts = testing::broken_texts(read(one.file));
    for (std::size_t i = 0; i < texts.size(); i += i < 20 ? 1 : 17)
      expect_corrupt(one.file, texts[i]);
  }
}

TEST_F(HostileFolder, BrokenAndOddIndexes) {
  use("dense-bf16-sharded");
  const std::string file = "model.safetensors.index.json";
  const json good = read(file);
  const auto texts = testing::broken_texts(good);
  for (std::size_t i = 0; i < texts.size(); i += i < 20 ? 1 : 7) expect_corrupt(file, texts[i]);
  for (const std::string& odd : testing::with_odd_values(good)) {
    SCOPED_TRACE(odd.substr(0, 300));
    write(file, odd);
    loads();  // an index may leave tensors out
  }
  const std::string text = good.dump();
  const std::string first = good.at("weight_map").begin().key();
  std::string twice = text;
  const std::size_t at = twice.find("\"weight_map\":{") + 14;
  twice.insert(at, "\"" + first + "\":\"elsewhere.safetensors\",");
  expect_corrupt(file, twice);
  const Error e = testing::error_of([&] { load_checkpoint(folder_->path()); });
  EXPECT_EQ(e.site().tensor, first);
  json outside = good;
  outside["weight_map"][first] = "../" + outside["weight_map"][first].get<std::string>();
  expect_corrupt(file, outside.dump());
}

/// null where no quantization is meant is written by some tools.
TEST_F(HostileFolder, QuantizationConfigMayBeNull) {
  use("dense-bf16");
  json config = read("config.json");
  config["quantization_config"] = nullptr;
  config["quantization"] = nullptr;
  write("config.json", config.dump());
  const Checkpoint loaded = load_checkpoint(folder_->path());
  EXPECT_TRUE(loaded.layers.empty());
  EXPECT_EQ(loaded.layout, "dense transformers");
  const TempFolder temp;
  save_checkpoint(temp.path("m"), testing::view_of(loaded));
  EXPECT_FALSE(
      json::parse(read_text_file(temp.path("m/config.json"))).contains("quantization_config"));
  const auto source = ModelSource::open(folder_->path());
  EXPECT_EQ(source->tensors().size(), loaded.tensors.size());
}

/// Entries of modules that are not quantized change nothing.
TEST_F(HostileFolder, NoneInAQuantoMap) {
  use("quanto-int4");
  const std::string digest = checkpoint_digest(testing::view_of(load_checkpoint(folder_->path())));
  json map = read("quanto_qmap.json");
  map["model.norm"] = {{"weights", "none"}, {"activations", "none"}};
  map["lm_head"] = {{"weights", "none"}, {"activations", "none"}};
  map["not.there"] = {{"weights", "qint4"}, {"activations", "none"}};
  write("quanto_qmap.json", map.dump());
  const Checkpoint again = load_checkpoint(folder_->path());
  EXPECT_EQ(checkpoint_digest(testing::view_of(again)), digest);
}

/// quanto_config inside a single torch file.
TEST(HostileSingleFile, OddQuantoConfig) {
  const TorchFile golden(golden_path("checkpoints/layout-quanto-single/quanto_model.pth"));
  const TempFolder temp;
  const std::string path = temp.path("odd.pth");
  LoadOptions options;
  options.weight_shape = [](const std::string& module) {
    const json& tensors = testing::expected_values().at("layout-quanto-dir");
    return tensors.at(module + ".weight").at("shape").get<std::vector<std::int64_t>>();
  };
  const auto load = [&](const TorchValue& settings) {
    TorchWriter writer(path);
    TorchValue::Pairs state;
    for (const auto& [key, value] : golden.root().find("state_dict")->pairs()) {
      state.emplace_back(key, TorchValue::tensor(writer.add(golden.read(value.as_tensor()).view)));
    }
    writer.finish(TorchValue::dict({{TorchValue::text("state_dict"), TorchValue::dict(state)},
                                    {TorchValue::text("quanto_config"), settings}}));
    return load_checkpoint(path, options);
  };
  const auto with = [](const char* key, const TorchValue& value) {
    return TorchValue::dict({{TorchValue::text(key), value}});
  };
  EXPECT_EQ(load(TorchValue::dict({})).layers.size(), 14u);
  const TorchValue odd[] = {{},
                            TorchValue::boolean(true),
                            TorchValue::integer(5),
                            TorchValue::integer(std::int64_t{1} << 62),
                            TorchValue::real(4.0),
                            TorchValue::text("four"),
                            TorchValue::list({TorchValue::integer(4)}),
                            TorchValue::dict({{TorchValue::integer(1), TorchValue::integer(4)}}),
                            TorchValue::size({4}),
                            TorchValue::dtype(DType::kF16)};
  int refused = 0;
  for (const char* key : {"bits", "weights", "activations", "modules"}) {
    for (const TorchValue& value : odd) {
      SCOPED_TRACE(std::string(key) + ": " + std::string(torch_kind_name(value.kind())));
      try {
        load(with(key, value));
      } catch (const Error& e) {
        ++refused;
        EXPECT_NE(errc_name(e.code()), errc_name(Errc::kInternal)) << e.what();
        EXPECT_EQ(e.site().path, path) << e.what();
      }
    }
  }
  EXPECT_GT(refused, 10);
}

}  // namespace
}  // namespace quantal

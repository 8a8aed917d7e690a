// Forms of a bitsandbytes layer beyond the usual one, and the files beside the tensors.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "formats/bnb/bnb_checkpoint.h"
#include "formats/bnb/bnb_params.h"
#include "formats/layers.h"
#include "kernels/support.h"
#include "quantal/archive.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

const Dialect& bnb_dialect() { return dialect_of(QuantizationMethod::BNB_NF4); }

QuantizeOptions options4(std::int64_t group, bool nested, const char* storage = "",
                         const char* type = "nf4") {
  QuantizeOptions o;
  o.group_size = group;
  o.double_quant = nested;
  o.quant_type = type;
  o.mode = storage;
  o.value_dtype = DType::kF16;
  return o;
}

Tensor matrix(std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  Random random(seed);
  Tensor out = make_tensor(DType::kF32, {rows, cols});
  auto* values = reinterpret_cast<float*>(out.bytes.data());
  for (std::int64_t i = 0; i < rows * cols; ++i) values[i] = random.uniform(-1, 1);
  return out;
}

Tensor text_tensor(const std::string& text) {
  return {DType::kU8, {static_cast<std::int64_t>(text.size())}, {text.begin(), text.end()}};
}

template <class T>
Tensor scalar_tensor(DType dtype, T value) {
  Tensor t = make_tensor(dtype, {});
  std::memcpy(t.bytes.data(), &value, sizeof(value));
  return t;
}

Tensor size_tensor(const std::vector<std::int64_t>& dims) {
  Tensor t = make_tensor(DType::kI64, {static_cast<std::int64_t>(dims.size())});
  if (!dims.empty()) std::memcpy(t.bytes.data(), dims.data(), t.bytes.size());
  return t;
}

TensorMap layer(const QuantizeOptions& options, std::int64_t rows = 33, std::int64_t cols = 64) {
  return TensorMap(
      bnb_dialect().export_layer(quantize(matrix(rows, cols, 4).view(), options).view(), "l."));
}

nlohmann::json state_of(TensorMap& map) {
  const Tensor& t = map.at("l.weight.quant_state.bitsandbytes__nf4");
  return nlohmann::json::parse(t.bytes.begin(), t.bytes.end());
}

/// What torch files of old versions hold instead of the JSON tensor.
void unpack_state(TensorMap& map) {
  const nlohmann::json state = state_of(map);
  map.erase("l.weight.quant_state.bitsandbytes__nf4");
  map.set("l.weight.quant_type", text_tensor(state.at("quant_type")));
  map.set("l.weight.blocksize",
          scalar_tensor(DType::kI32, state.at("blocksize").get<std::int32_t>()));
  map.set("l.weight.dtype", text_tensor(state.at("dtype")));
  map.set("l.weight.shape", size_tensor(state.at("shape").get<std::vector<std::int64_t>>()));
  if (!state.contains("nested_offset")) return;
  map.set("l.weight.nested_blocksize", scalar_tensor(DType::kI32, 256));
  map.set("l.weight.nested_dtype", text_tensor("float32"));
  map.set("l.weight.nested_offset",
          scalar_tensor(DType::kF32, state.at("nested_offset").get<float>()));
}

// ------------------------------------------------------------------ individual entries

TEST(BnbLayers, IndividualEntriesOfOldFiles) {
  for (const bool nested : {false, true}) {
    TensorMap packed = layer(options4(64, nested));
    TensorMap old = packed;
    unpack_state(old);
    const auto has = [&](const std::string& suffix) {
      return old.lookup()("l." + suffix) != nullptr;
    };
    EXPECT_TRUE(bnb_dialect().recognizes(has));
    const PackedMatrix w = bnb_dialect().import_layer("l.", old.lookup(), {});
    expect_same_bytes(w, bnb_dialect().import_layer("l.", packed.lookup(), {}), "old");
    // Written as upstream writes it today.
    for (const NamedTensor& t : bnb_dialect().export_layer(w.view(), "l.")) {
      EXPECT_EQ(t.tensor.bytes, packed.at(t.name).bytes) << t.name;
    }
  }
}

TEST(BnbLayers, DamagedEntriesAreNamed) {
  const auto refused = [](const char* name, const Tensor& tensor, const char* part) {
    TensorMap map = layer(options4(64, true));
    unpack_state(map);
    map.set(name, tensor);
    expect_error(Errc::kCorrupt, {part},
                 [&] { bnb_dialect().import_layer("l.", map.lookup(), {}); });
  };
  refused("l.weight.quant_type", text_tensor("int4"), "quant_type");
  refused("l.weight.quant_type", scalar_tensor(DType::kI32, 4), "quant_type");
  refused("l.weight.blocksize", scalar_tensor(DType::kI32, -64), "blocksize");
  refused("l.weight.blocksize", text_tensor("\xff\xfe"), "blocksize");
  refused("l.weight.shape", size_tensor({}), "shape");
  refused("l.weight.shape", size_tensor({33, -64}), "shape");
  refused("l.weight.nested_offset", scalar_tensor(DType::kF32, NAN), "nested_offset");
}

// ------------------------------------------------------------------ shapes, storage

TEST(BnbLayers, AnyNumberOfDimensions) {
  for (const std::vector<std::int64_t>& shape :
       {std::vector<std::int64_t>{33 * 64}, {3, 11, 64}, {1, 3, 11, 64}}) {
    for (const bool nested : {false, true}) {
      TensorMap map = layer(options4(64, nested));
      nlohmann::ordered_json state = nlohmann::ordered_json::parse(state_of(map).dump());
      const Tensor& text = map.at("l.weight.quant_state.bitsandbytes__nf4");
      std::string json(text.bytes.begin(), text.bytes.end());
      std::string sizes;
      for (const std::int64_t d : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(d);
      json.replace(json.find("33, 64"), 6, sizes);
      map.set("l.weight.quant_state.bitsandbytes__nf4", text_tensor(json));
      const PackedMatrix w = bnb_dialect().import_layer("l.", map.lookup(), {});
      EXPECT_EQ(w.spec.cols, shape.back());
      EXPECT_EQ(w.spec.rows * w.spec.cols, 33 * 64);
      EXPECT_EQ(w.spec.residue_bytes, static_cast<std::int64_t>(8 * shape.size()));
      for (const NamedTensor& t : bnb_dialect().export_layer(w.view(), "l.")) {
        EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
      }
      TensorMap flat = layer(options4(64, nested));
      EXPECT_EQ(decode(w, DType::kF16).bytes,
                decode(bnb_dialect().import_layer("l.", flat.lookup(), {}), DType::kF16).bytes);
    }
  }
}

TEST(BnbLayers, EveryStorageTypeHoldsTheSameBytes) {
  const PackedMatrix plain = quantize(matrix(32, 64, 4).view(), options4(64, true));
  const auto bytes = tensor_named(bnb_dialect().export_layer(plain.view(), ""), "weight").bytes;
  for (const char* storage : {"uint8", "int8", "float16", "bfloat16", "float32"}) {
    const PackedMatrix w = quantize(matrix(32, 64, 4).view(), options4(64, true, storage));
    const auto tensors = bnb_dialect().export_layer(w.view(), "");
    const Tensor& weight = tensor_named(tensors, "weight");
    EXPECT_EQ(dtype_torch_name(weight.dtype), storage);
    EXPECT_EQ(weight.bytes, bytes);
    EXPECT_EQ(weight.shape, (std::vector<std::int64_t>{
                                static_cast<std::int64_t>(1024 / dtype_size(weight.dtype)), 1}));
    TensorMap map(tensors);
    expect_same_bytes(bnb_dialect().import_layer("", map.lookup(), {}), w, storage);
  }
  expect_error(Errc::kConfig, {"quant_storage", "'int64'", "bfloat16"},
               [] { quantize(matrix(2, 64, 4).view(), options4(64, true, "int64")); });
  expect_error(Errc::kShape, {"packed bytes are 1", "multiple of 4"},
               [] { quantize(matrix(1, 2, 4).view(), options4(64, true, "float32")); });
}

TEST(BnbLayers, StoredNestedMapIsHonoured) {
  TensorMap map = layer(options4(64, true));
  auto* values = reinterpret_cast<float*>(map.at("l.weight.nested_quant_map").bytes.data());
  for (int i = 0; i < 256; ++i) values[i] *= 0.5F;
  const PackedMatrix w = bnb_dialect().import_layer("l.", map.lookup(), {});
  for (const NamedTensor& t : bnb_dialect().export_layer(w.view(), "l.")) {
    EXPECT_EQ(t.tensor.bytes, map.at(t.name).bytes) << t.name;
  }
  TensorMap standard = layer(options4(64, true));
  EXPECT_NE(decode(w, DType::kF16).bytes,
            decode(bnb_dialect().import_layer("l.", standard.lookup(), {}), DType::kF16).bytes);
}

// ------------------------------------------------------------------ torch files of the guide

/// Imports every layer of a torch file, compares its values with the same layer of the safetensors
/// checkpoint that the file was made from, and the exported tensors with the file's.
int check_torch_file(const std::string& path, const std::string& twin) {
  const TorchFile file(golden_path("checkpoints/" + path));
  const TorchValue* model = file.root().find("model");
  const TorchValue& state = model != nullptr ? *model : file.root();
  const SafetensorsFile original(golden_path("checkpoints/" + twin + "/model.safetensors"));
  std::map<std::string, HeldTensor> held;
  for (const auto& [key, value] : state.pairs()) {
    if (value.is_tensor()) held[key.as_text()] = file.read(value.as_tensor());
  }
  const TensorLookup lookup = [&](const std::string& name) {
    const auto it = held.find(name);
    return it == held.end() ? nullptr : &it->second.view;
  };
  int layers = 0;
  for (const auto& [name, tensor] : held) {
    const std::size_t at = name.find("proj.weight");
    if (at == std::string::npos || at + 11 != name.size()) continue;
    const std::string prefix = name.substr(0, at + 5);
    const auto has = [&](const std::string& suffix) { return lookup(prefix + suffix) != nullptr; };
    EXPECT_TRUE(bnb_dialect().recognizes(has)) << prefix;
    const PackedMatrix w = bnb_dialect().import_layer(prefix, lookup, {});
    const PackedMatrix same = bnb_dialect().import_layer(
        prefix, [&](const std::string& n) { return original.find(n); }, {});
    expect_same_bytes(w, same, prefix);
    for (const NamedTensor& t : bnb_dialect().export_layer(w.view(), prefix)) {
      EXPECT_EQ(t.tensor.bytes, bytes_of(held.at(t.name).view)) << t.name;
    }
    ++layers;
  }
  return layers;
}

TEST(BnbLayers, TorchFilesOfTheGuide) {
  EXPECT_EQ(check_torch_file("layout-bnb-dir/pytorch_model.bin", "bnb-nf4"), 14);
  EXPECT_EQ(check_torch_file("layout-bnb-single/model.pth", "bnb-int8"), 14);
}

// ------------------------------------------------------------------ files beside the tensors

nlohmann::json golden_config(const std::string& name) {
  std::ifstream in(golden_path("checkpoints/" + name + "/config.json"));
  return nlohmann::json::parse(in);
}

const FileLayout& layout(std::string_view name) {
  for (const FileLayout& l : bnb_dialect().layouts) {
    if (l.name == name) return l;
  }
  throw std::runtime_error("no such layout");
}

LayerEntry first_layer(const std::string& name, const std::string& config = "{}") {
  const SafetensorsFile file(golden_path("checkpoints/" + name + "/model.safetensors"));
  const auto settings = bnb_dialect().read_settings({{"config.json", config}});
  LayerFacts facts;
  if (!settings.empty()) facts.settings = settings.at("");
  const std::string module = "model.layers.1.mlp.up_proj";
  const auto lookup = [&](const std::string& n) { return file.find(n); };
  return {module, bnb_dialect().import_layer(module + ".", lookup, facts).spec};
}

TEST(BnbSettings, TransformersConfigFollowsFromTheLayers) {
  for (const char* name :
       {"bnb-nf4", "bnb-nf4-double", "bnb-fp4-f16", "bnb-nf4-storage-bf16", "bnb-int8"}) {
    SCOPED_TRACE(name);
    const std::vector<LayerEntry> layers(3, first_layer(name));
    const std::vector<std::string> dense = {"lm_head"};
    const SideFiles files = bnb_dialect().side_files(layout("transformers"), layers, dense);
    EXPECT_TRUE(files.texts.empty());
    nlohmann::json original = golden_config(name).at("quantization_config");
    original["llm_int8_skip_modules"] = dense;  // null there: the default list
    EXPECT_EQ(nlohmann::json::parse(files.config_patch).at("quantization_config"), original);
  }
}

TEST(BnbSettings, ThresholdGoesRoundThroughTheConfig) {
  nlohmann::json config = golden_config("bnb-int8");
  config["quantization_config"]["llm_int8_threshold"] = 4.25;
  const std::vector<LayerEntry> layers = {first_layer("bnb-int8", config.dump())};
  const auto patch = [&](std::string_view name) {
    return bnb_dialect().side_files(layout(name), layers, {});
  };
  EXPECT_EQ(nlohmann::json::parse(patch("transformers").config_patch)
                .at("quantization_config")
                .at("llm_int8_threshold"),
            4.25);
  const std::string guide = patch("guide").texts.at("quantization_config.json");
  EXPECT_EQ(nlohmann::json::parse(guide).at("llm_int8_threshold"), 4.25);
  const auto settings = bnb_dialect().read_settings({{"quantization_config.json", guide}});
  EXPECT_EQ(nlohmann::json::parse(settings.at("")).at("llm_int8_threshold"), 4.25);
}

TEST(BnbSettings, GuideWritesTheGoldenSettings) {
  std::ifstream in(golden_path("checkpoints/layout-bnb-dir/quantization_config.json"));
  const nlohmann::json golden = nlohmann::json::parse(in);
  LayerEntry entry = first_layer("bnb-nf4");
  entry.spec.value_dtype = DType::kF16;
  const std::vector<LayerEntry> layers = {entry};
  const SideFiles files = bnb_dialect().side_files(layout("guide"), layers, {});
  EXPECT_EQ(nlohmann::json::parse(files.texts.at("quantization_config.json")), golden);
  EXPECT_TRUE(files.config_patch.empty());
  const std::vector<LayerEntry> int8 = {first_layer("bnb-int8")};
  const SideFiles eight = bnb_dialect().side_files(layout("guide"), int8, {});
  EXPECT_EQ(nlohmann::json::parse(eight.texts.at("quantization_config.json")).at("bits"), 8);
  EXPECT_TRUE(bnb_dialect().side_files(layout("single"), int8, {}).texts.empty());
}

TEST(BnbSettings, TwoWidthsAreRefusedWhereTheConfigHasOne) {
  const std::vector<LayerEntry> layers = {first_layer("bnb-nf4"), first_layer("bnb-int8")};
  expect_error(Errc::kUnsupported, {"4 and 8 bits", "guide", "single"},
               [&] { bnb_dialect().side_files(layout("transformers"), layers, {}); });
  EXPECT_EQ(nlohmann::json::parse(bnb_dialect()
                                      .side_files(layout("guide"), layers, {})
                                      .texts.at("quantization_config.json"))
                .at("bits"),
            4);
}

TEST(BnbSettings, ForeignAndDamagedTexts) {
  const auto read = [](const char* file, const std::string& text) {
    return bnb_dialect().read_settings({{file, text}});
  };
  EXPECT_TRUE(read("config.json", "{}").empty());
  EXPECT_TRUE(read("config.json", golden_config("hqq-transformers").dump()).empty());
  EXPECT_TRUE(read("hqq_config.json", "nonsense").empty());
  EXPECT_EQ(read("config.json", golden_config("bnb-nf4").dump()).size(), 1u);
  const auto refused = [&](const char* file, const char* text, const char* part) {
    expect_error(Errc::kCorrupt, {file, part}, [&] { read(file, text); });
  };
  refused("quantization_config.json", "[4]", "JSON object");
  refused("quantization_config.json", R"({"bits": 3})", "bits is 3");
  refused("quantization_config.json", R"({"bits": 8, "llm_int8_threshold": "6"})",
          "llm_int8_threshold");
  refused("quantization_config.json", R"({"bits": 8, "llm_int8_threshold": -1})",
          "llm_int8_threshold");
  refused("config.json",
          R"({"quantization_config": {"quant_method": "bitsandbytes", "llm_int8_threshold": []}})",
          "llm_int8_threshold");
}

}  // namespace
}  // namespace quantal::testing

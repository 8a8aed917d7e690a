// MLX against vectors and checkpoints written by mlx 0.32.4 and mlx-lm 0.29.1 on the CPU.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "checkpoint/sha256.h"
#include "formats/layers.h"
#include "quantal/archive.h"
#include "support/golden.h"

namespace quantal::testing {
namespace {

const Dialect& mlx() { return dialect_by_name("mlx"); }

QuantizeOptions options_of(const nlohmann::json& c) {
  QuantizeOptions options;
  options.mode = c.at("mode").get<std::string>();
  options.bits = c.value("bits", 0);
  options.group_size = c.value("group_size", std::int64_t{0});
  options.value_dtype = parse_dtype(c.at("dtype").get<std::string>());
  return options;
}

bool is_affine(const nlohmann::json& c) { return c.at("mode") == "affine"; }

std::vector<std::string> fields_of(const nlohmann::json& c) {
  std::vector<std::string> out = {"weight", "scales"};
  if (is_affine(c)) out.emplace_back("biases");
  return out;
}

TEST(MlxGolden, QuantizesBitForBit) {
  const GoldenBook book("mlx");
  int cases = 0;
  for (const std::string_view kernels : available_cpu_kernels()) {
    select_cpu_kernels(kernels);
    for (const nlohmann::json& c : book.cases()) {
      SCOPED_TRACE(c.dump() + " " + std::string(kernels));
      const Tensor input = golden_input(c.at("input").get<std::string>(), c.at("dtype"));
      const PackedMatrix w = quantize(input.view(), mlx(), options_of(c));
      const auto tensors = mlx().export_layer(w.view(), "layer.");
      EXPECT_EQ(tensors.size(), fields_of(c).size());
      for (const std::string& field : fields_of(c)) {
        const Tensor& own = tensor_named(tensors, "layer." + field);
        const TensorView& golden = book.field(c, field);
        EXPECT_EQ(own.dtype, golden.dtype) << field;
        EXPECT_EQ(own.shape, golden.shape) << field;
        EXPECT_EQ(own.bytes, bytes_of(golden)) << field;
      }
      EXPECT_EQ(decode(w, w.spec.value_dtype).bytes, bytes_of(book.field(c, "dequantized")));
      ++cases;
    }
  }
  select_cpu_kernels(available_cpu_kernels().front());
  EXPECT_EQ(cases, 27 * static_cast<int>(available_cpu_kernels().size()));
}

TEST(MlxGolden, ImportsAndReexportsEveryCase) {
  const GoldenBook book("mlx");
  for (const nlohmann::json& c : book.cases()) {
    SCOPED_TRACE(c.dump());
    TensorMap map;
    for (const std::string& field : fields_of(c)) {
      const TensorView& t = book.field(c, field);
      map.set(field, {t.dtype, t.shape, bytes_of(t)});
    }
    const TensorView& values = book.field(c, "dequantized");
    nlohmann::json settings = {{"dtype", dtype_torch_name(values.dtype)}, {"mode", c.at("mode")}};
    if (is_affine(c)) settings.update({{"bits", c.at("bits")}, {"group_size", c["group_size"]}});
    const PackedMatrix w = mlx().import_layer("", map.lookup(), {settings.dump(), {}});
    EXPECT_EQ(decode(w, values.dtype).bytes, bytes_of(values));
    for (const NamedTensor& t : mlx().export_layer(w.view(), "")) {
      EXPECT_EQ(t.tensor.bytes, bytes_of(book.field(c, t.name))) << t.name;
    }
    // The shape of the weight says the same as the settings; so do the types in floating modes.
    const LayerFacts shape{R"({"dtype": ")" + std::string(dtype_name(values.dtype)) + "\"}",
                           values.shape};
    expect_same_bytes(mlx().import_layer("", map.lookup(), shape), w, "from the shape");
  }
}

// ------------------------------------------------------------------ checkpoints

std::string read_text(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string digest_as_f32(const Tensor& values) {
  std::vector<float> wide(static_cast<std::size_t>(values.view().numel()));
  widen_to_f32(values.dtype, values.bytes.data(), values.view().numel(), wide.data());
  checkpoint::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(wide.data()), wide.size() * sizeof(float)});
  return hash.hex();
}

/// All tensors of the weights file of a golden folder.
TensorMap tensors_of(const std::string& folder, std::vector<std::string>& names) {
  TensorMap out;
  for (const char* npz : {"weights.npz", "mlx_model.npz"}) {
    if (!std::filesystem::exists(folder + npz)) continue;
    const NpzFile file(folder + npz);
    for (const TensorInfo& info : file.tensors()) {
      const HeldTensor held = file.read(info.name);
      out.set(info.name, {held.view.dtype, held.view.shape, bytes_of(held.view)});
      names.push_back(info.name);
    }
    return out;
  }
  const SafetensorsFile file(folder + "model.safetensors");
  for (const auto& [name, view] : file.tensors()) {
    out.set(name, {view.dtype, view.shape, bytes_of(view)});
    names.push_back(name);
  }
  return out;
}

/// Imports, decodes and exports every layer of a golden folder, embeddings included.
std::vector<LayerEntry> check_checkpoint(const std::string& name) {
  const std::string folder = golden_path("checkpoints/" + name + "/");
  std::vector<std::string> names;
  TensorMap map = tensors_of(folder, names);
  const TensorLookup lookup = map.lookup();
  const auto expected =
      nlohmann::json::parse(read_text(golden_path("vectors/checkpoint_expected.json"))).at(name);
  SideTexts texts;
  for (const char* text : {"config.json", "mlx_config.json"}) {
    if (std::filesystem::exists(folder + text)) texts[text] = read_text(folder + text);
  }
  const auto settings = mlx().read_settings(texts);
  std::vector<LayerEntry> layers;
  std::size_t tensors = 0;
  for (const std::string& scales : names) {
    constexpr std::string_view kEnding = ".scales";
    if (!scales.ends_with(kEnding)) continue;
    const std::string module = scales.substr(0, scales.size() - kEnding.size());
    SCOPED_TRACE(module);
    const auto has = [&](const std::string& suffix) {
      return lookup(module + "." + suffix) != nullptr;
    };
    EXPECT_TRUE(mlx().recognizes(has));
    const auto own = settings.find(module);
    const PackedMatrix w = mlx().import_layer(
        module + ".", lookup, {own != settings.end() ? own->second : settings.at(""), {}});
    EXPECT_EQ(digest_as_f32(decode(w, w.spec.value_dtype)),
              expected.at(module + ".weight").at("sha256_f32"));
    for (const NamedTensor& t : mlx().export_layer(w.view(), module + ".")) {
      const TensorView* original = lookup(t.name);
      if (original == nullptr) {
        ADD_FAILURE() << t.name << " is not in the file";
        continue;
      }
      EXPECT_EQ(t.tensor.dtype, original->dtype) << t.name;
      EXPECT_EQ(t.tensor.shape, original->shape) << t.name;
      EXPECT_EQ(t.tensor.bytes, bytes_of(*original)) << t.name;
      ++tensors;
    }
    layers.push_back({module, w.spec});
  }
  // What remains are the norms, and dense embeddings.
  for (const std::string& tensor : names) {
    tensors += tensor.find("norm") != std::string::npos;
    tensors += tensor.ends_with("embed_tokens.weight") && lookup(tensor)->dtype != DType::kU32;
  }
  EXPECT_EQ(tensors, names.size());
  return layers;
}

TEST(MlxGolden, Checkpoints) {
  for (const char* name : {"mlx-4bit", "mlx-mixed", "mlx-mxfp4"}) {
    SCOPED_TRACE(name);
    const std::vector<LayerEntry> layers = check_checkpoint(name);
    const bool mixed = std::string_view(name) == "mlx-mixed";  // its embeddings are dense
    EXPECT_EQ(layers.size(), mixed ? 15u : 16u) << "14 projections, lm_head, embeddings";
    // Settings written for these layers are those of the file.
    const FileLayout& layout = mlx().layouts.front();
    const SideFiles files = mlx().side_files(layout, layers, {});
    const auto patch = nlohmann::json::parse(files.config_patch);
    const auto config = nlohmann::json::parse(
        read_text(golden_path("checkpoints/" + std::string(name) + "/config.json")));
    EXPECT_EQ(patch.at("quantization"), config.at("quantization"));
    EXPECT_EQ(patch.at("quantization_config"), config.at("quantization_config"));
    EXPECT_EQ(files.metadata, (std::map<std::string, std::string>{{"format", "mlx"}}));
    const SafetensorsFile file(
        golden_path("checkpoints/" + std::string(name) + "/model.safetensors"));
    EXPECT_EQ(file.metadata().at("format"), "mlx");
  }
}

TEST(MlxGolden, NpzCheckpoints) {
  for (const char* name : {"mlx-npz", "layout-mlx-dir"}) {
    SCOPED_TRACE(name);
    for (const LayerEntry& layer : check_checkpoint(name)) {
      EXPECT_EQ(layer.spec.bits, 4) << layer.name;
      EXPECT_EQ(layer.spec.group_size, 32) << layer.name;
    }
  }
}

TEST(MlxGolden, MixedWidthsAreRead) {
  std::map<std::pair<int, std::int64_t>, int> seen;
  for (const LayerEntry& layer : check_checkpoint("mlx-mixed")) {
    ++seen[{layer.spec.bits, layer.spec.group_size}];
  }
  const std::map<std::pair<int, std::int64_t>, int> expected = {
      {{3, 64}, 4}, {{4, 64}, 8}, {{8, 32}, 3}};
  EXPECT_EQ(seen, expected);
}

}  // namespace
}  // namespace quantal::testing

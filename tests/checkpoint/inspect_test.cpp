#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "io/temp_folder.h"
#include "quantal/checkpoint.h"
#include "support/golden.h"

namespace quantal {
namespace {

using nlohmann::json;
using testing::golden_path;
using testing::TempFolder;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Inspect, GgufCountsParametersAndBytes) {
  const std::string path = golden_path("checkpoints/gguf/tiny-q4_0.gguf");
  const json found = json::parse(inspect_json(path));
  EXPECT_EQ(found.at("container"), "GGUF version 3");
  EXPECT_EQ(found.at("metadata").at("general.architecture"), "llama");
  EXPECT_EQ(found.at("metadata").at("tokenizer.ggml.tokens"), "array of 256");
  EXPECT_EQ(found.at("totals").at("tensors"), 21);
  // 2 * 256*64 embeddings, 2 layers of 2*64*64 + 2*32*64 + 3*128*64, 5 norms of 64
  const std::int64_t matrices = 2 * 256 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64);
  EXPECT_EQ(found.at("totals").at("parameters"), matrices + 5 * 64);
  EXPECT_EQ(found.at("types").at("Q4_0").at("bytes"), matrices / 32 * 18);
  EXPECT_EQ(found.at("types").at("F32").at("bytes"), 5 * 64 * 4);

  const std::string text = inspect_text(path, false);
  EXPECT_TRUE(contains(text, "Q4_0")) << text;
  EXPECT_TRUE(contains(text, "9 more")) << text;
  EXPECT_TRUE(contains(text, "0.5") && contains(text, "bytes/param")) << text;
  EXPECT_TRUE(contains(inspect_text(path, true), "blk.1.ffn_down.weight"));
  EXPECT_FALSE(contains(inspect_text(path, true), "more"));
}

TEST(Inspect, QuantizedFolderNamesDialectAndLayers) {
  const json found = json::parse(inspect_json(golden_path("checkpoints/bnb-nf4-double")));
  EXPECT_EQ(found.at("quantization"), "bitsandbytes");
  int layers = 0;
  std::int64_t bytes = 0;
  for (const auto& tensor : found.at("tensors")) {
    bytes += tensor.at("bytes").get<std::int64_t>();
    if (!tensor.at("quantized_layer").get<bool>()) continue;
    ++layers;
    EXPECT_TRUE(contains(tensor.at("type"), "bnb nf4, block 64, nested")) << tensor;
  }
  EXPECT_EQ(layers, 14);
  // Every byte of the data area is counted once.
  const SafetensorsFile file(golden_path("checkpoints/bnb-nf4-double/model.safetensors"));
  std::int64_t in_file = 0;
  for (const auto& tensor : file.tensors()) in_file += std::ssize(tensor.second.bytes);
  EXPECT_EQ(bytes, in_file);
  EXPECT_EQ(
      json::parse(inspect_json(golden_path("checkpoints/hqq-transformers"))).at("quantization"),
      "HQQ");
}

TEST(Inspect, ForeignFoldersShowTheirTensors) {
  const TempFolder gptq;
  const Tensor codes = make_tensor(DType::kI32, {8, 64});
  const std::vector<std::pair<std::string, TensorView>> tensors = {{"a.qweight", codes.view()},
                                                                   {"a.qzeros", codes.view()}};
  write_safetensors(gptq.path("model.safetensors"), tensors);
  std::ofstream(gptq.path("config.json")) << R"({"quantization_config":{"quant_method":"gptq"}})";
  const json found = json::parse(inspect_json(gptq.path()));
  EXPECT_EQ(found.at("quantization"), "");
  EXPECT_TRUE(contains(found.at("unread"), "gptq"));
  EXPECT_TRUE(contains(inspect_text(gptq.path(), false), "raw tensors"));
  EXPECT_EQ(found.at("tensors").size(), 2u);
  EXPECT_THROW(load_checkpoint(gptq.path()), Error);
  const json shards = json::parse(inspect_json(golden_path("checkpoints/dense-bf16-sharded")));
  EXPECT_EQ(shards.at("container"), "safetensors, 3 files");
  EXPECT_EQ(shards.at("quantization"), "");
  EXPECT_EQ(shards.at("totals").at("bytes_per_parameter"), 2.0);
  const json npy = json::parse(inspect_json(golden_path("containers/c_order.npy")));
  EXPECT_EQ(npy.at("totals").at("parameters"), 12);
}

TEST(Inspect, EveryContainerSaysItsLayout) {
  const std::tuple<const char*, const char*, const char*, const char*> cases[] = {
      {"quanto-int4", "safetensors, 1 file", "quanto quanto", "Quanto"},
      {"mlx-npz", "npz, 1 file", "mlx npz", "MLX"},
      {"hqq-pt-2bit", "torch, 1 file", "hqq qmodel", "HQQ"},
      {"layout-bnb-single/model.pth", "torch, 1 file", "bnb single", "bitsandbytes"},
      {"dense-f16-bin", "torch, 1 file", "dense torch", ""},
  };
  for (const auto& [path, container, layout, quantization] : cases) {
    SCOPED_TRACE(path);
    const json found = json::parse(inspect_json(golden_path("checkpoints/" + std::string(path))));
    EXPECT_EQ(found.at("container"), container);
    EXPECT_EQ(found.at("layout"), layout);
    EXPECT_EQ(found.at("quantization"), quantization);
    EXPECT_EQ(found.at("unread"), "");
  }
}

TEST(Inspect, ControlCharactersStayOffTheTerminal) {
  const TempFolder folder;
  const Tensor byte = make_tensor(DType::kU8, {1});
  const std::vector<std::pair<std::string, TensorView>> tensors = {{"a\x1b[2J", byte.view()}};
  write_safetensors(folder.path("x.safetensors"), tensors, {{"k", "\x1b]0;x\x07"}});
  EXPECT_EQ(inspect_text(folder.path("x.safetensors"), true).find('\x1b'), std::string::npos);
}

TEST(Inspect, RefusesWhatIsNoModel) {
  EXPECT_THROW(inspect_text("/nonexistent", false), Error);
  EXPECT_THROW(inspect_json(golden_path("containers/bad_hole.safetensors")), Error);
  const TempFolder empty;
  EXPECT_THROW(inspect_text(empty.path(), false), Error);
}

}  // namespace
}  // namespace quantal

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "io/read_error.h"
#include "quantal/io.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::expect_error;
using testing::golden_path;
using testing::read_bytes;
using testing::TempFolder;

/// Tensors of several types and sizes, each byte its own.
std::vector<std::pair<std::string, Tensor>> sample() {
  std::vector<std::pair<std::string, Tensor>> out;
  const std::tuple<const char*, DType, std::vector<std::int64_t>> rows[] = {
      {"a.scale", DType::kF32, {5}},   {"a.codes", DType::kU8, {7, 3}},
      {"b.codes", DType::kU8, {40}},   {"b.scale", DType::kF32, {2, 2}},
      {"empty", DType::kBF16, {0, 8}}, {"scalar", DType::kI64, {}},
      {"eight", DType::kF8E8M0, {3}},  {"flag", DType::kBool, {2}}};
  std::uint8_t next = 0;
  for (const auto& [name, dtype, shape] : rows) {
    Tensor tensor = make_tensor(dtype, shape);
    for (std::uint8_t& byte : tensor.bytes) byte = dtype == DType::kBool ? 1 : next++;
    out.emplace_back(name, std::move(tensor));
  }
  return out;
}

std::vector<TensorInfo> infos_of(const std::vector<std::pair<std::string, Tensor>>& tensors) {
  std::vector<TensorInfo> out;
  for (const auto& [name, tensor] : tensors) out.push_back({name, tensor.dtype, tensor.shape});
  return out;
}

TEST(SafetensorsWriter, AnyOrderGivesTheSameBytes) {
  const TempFolder folder;
  auto tensors = sample();
  std::vector<std::pair<std::string, TensorView>> views;
  for (const auto& [name, tensor] : tensors) views.emplace_back(name, tensor.view());
  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  write_safetensors(folder.path("whole"), views, metadata);
  for (const bool reversed : {false, true}) {
    const std::string path = folder.path("parts");
    SafetensorsWriter writer(path, infos_of(tensors), metadata);
    if (reversed) std::reverse(tensors.begin(), tensors.end());
    for (const auto& [name, tensor] : tensors) writer.put(name, tensor.view());
    writer.finish();
    EXPECT_EQ(read_bytes(path), read_bytes(folder.path("whole")));
  }
  const SafetensorsFile file(folder.path("whole"));
  for (const auto& [name, tensor] : tensors) {
    const TensorView* found = file.find(name);
    ASSERT_NE(found, nullptr);
    EXPECT_EQ(found->shape, tensor.shape);
    EXPECT_TRUE(std::equal(found->bytes.begin(), found->bytes.end(), tensor.bytes.begin(),
                           tensor.bytes.end()));
  }
}

TEST(SafetensorsWriter, RefusesWhatWasNotAnnounced) {
  const TempFolder folder;
  const std::string path = folder.path("x.safetensors");
  const auto tensors = sample();
  const Tensor& first = tensors[0].second;
  {
    SafetensorsWriter writer(path, infos_of(tensors));
    expect_error([&] { writer.put("other", first.view()); }, Errc::kConfig, "not announced");
    expect_error([&] { writer.put("a.codes", first.view()); }, Errc::kDtype, "f32, expected u8");
    expect_error([&] { writer.put("b.scale", first.view()); }, Errc::kShape,
                 "[5], expected [2, 2]");
    expect_error(
        [&] {
          writer.put("a.scale", {DType::kF32, {5}, first.view().bytes.subspan(4)});
        },
        Errc::kShape, "is 16, expected 20");
    writer.put("a.scale", first.view());
    expect_error([&] { writer.put("a.scale", first.view()); }, Errc::kConfig, "arrives twice");
    expect_error([&] { writer.finish(); }, Errc::kConfig,
                 "never arrived: a.codes, b.codes, b.scale, eight, empty, ... (7 in all)");
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  std::vector<TensorInfo> twice = infos_of(tensors);
  twice.push_back(twice[0]);
  expect_error([&] { SafetensorsWriter writer(path, twice); }, Errc::kConfig, "given twice");
  expect_error(
      [&] {
        SafetensorsWriter writer(path, {{"__metadata__", DType::kU8, {}}});
      },
      Errc::kConfig, "reserved");
  expect_error(
      [&] {
        SafetensorsWriter writer(path, {{"x", DType::kU8, {1LL << 40, 1LL << 40}}});
      },
      Errc::kShape, "63 bits");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(ShardedSafetensorsWriter, CutsByBytesAndWritesAnIndex) {
  const TempFolder folder;
  const auto tensors = sample();
  ShardedSafetensorsWriter writer(folder.path(), infos_of(tensors),
                                  {.max_shard_bytes = 41, .metadata = {{"format", "pt"}}});
  // 20 + 21 | 40 | 16 + 0 + 8 + 3 + 2
  const std::vector<std::string> files = {
      "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
      "model-00003-of-00003.safetensors", "model.safetensors.index.json"};
  EXPECT_EQ(writer.files(), files);
  for (std::size_t i = tensors.size(); i-- > 0;) {
    writer.put(tensors[i].first, tensors[i].second.view());
  }
  for (const std::string& name : files) EXPECT_FALSE(std::filesystem::exists(folder.path(name)));
  writer.finish();
  const auto index = nlohmann::json::parse(read_bytes(folder.path(files.back())));
  EXPECT_EQ(index.at("metadata").at("total_size"), 110);
  EXPECT_EQ(index.at("weight_map").size(), tensors.size());
  EXPECT_EQ(index["weight_map"]["a.codes"], files[0]);
  EXPECT_EQ(index["weight_map"]["b.codes"], files[1]);
  for (const auto& [name, tensor] : tensors) {
    const SafetensorsFile file(folder.path(index["weight_map"][name].get<std::string>()));
    EXPECT_EQ(file.metadata().at("format"), "pt");
    ASSERT_NE(file.find(name), nullptr);
    const auto bytes = file.find(name)->bytes;
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
  }
}

TEST(ShardedSafetensorsWriter, OneFileHasNoIndex) {
  for (const std::int64_t limit : {0, 110, 1000}) {
    const TempFolder folder;
    const auto tensors = sample();
    ShardedSafetensorsWriter writer(folder.path(), infos_of(tensors),
                                    {.stem = "adapter", .max_shard_bytes = limit});
    EXPECT_EQ(writer.files(), std::vector<std::string>{"adapter.safetensors"});
    for (const auto& [name, tensor] : tensors) writer.put(name, tensor.view());
    writer.finish();
    EXPECT_EQ(SafetensorsFile(folder.path("adapter.safetensors")).tensors().size(), tensors.size());
  }
}

TEST(ShardedSafetensorsWriter, RefusesAndLeavesNothing) {
  const TempFolder folder;
  const auto tensors = sample();
  const auto open = [&](ShardOptions options) {
    return [&, options] { ShardedSafetensorsWriter w(folder.path(), infos_of(tensors), options); };
  };
  expect_error(open({.stem = "../x"}), Errc::kConfig, "stem");
  expect_error(open({.max_shard_bytes = -1}), Errc::kConfig, "max_shard_bytes is -1");
  {
    ShardedSafetensorsWriter writer(folder.path(), infos_of(tensors), {.max_shard_bytes = 50});
    writer.put(tensors[1].first, tensors[1].second.view());
    expect_error([&] { writer.finish(); }, Errc::kConfig, "never arrived");
    expect_error([&] { writer.put("x", tensors[0].second.view()); }, Errc::kConfig,
                 "not announced");
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace quantal

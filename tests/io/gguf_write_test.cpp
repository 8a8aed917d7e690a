// Writing GGUF: what is written is read back, nothing half-written stays, lies are refused.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "io/gguf_builder.h"
#include "io/temp_folder.h"
#include "quantal/io.h"

namespace quantal {
namespace {

using testing::GgufBuilder;
using testing::TempFolder;

/// Type 0 has one byte per element, type 1 two bytes per four elements.
GgufBlockSize block_size(std::uint32_t type) {
  return type == 0 ? GgufBlockSize{1, 1} : type == 1 ? GgufBlockSize{4, 2} : GgufBlockSize{};
}

GgufPair array_pair(const std::string& key, GgufType type, std::vector<GgufValue> values) {
  auto array = std::make_shared<GgufArray>();
  array->element_type = static_cast<std::uint32_t>(type);
  array->values = std::move(values);
  return {key, GgufType::kArray, array};
}

std::vector<GgufPair> all_types() {
  return {
      {"u8", GgufType::kU8, std::uint64_t{255}},
      {"i8", GgufType::kI8, std::int64_t{-128}},
      {"u16", GgufType::kU16, std::uint64_t{65535}},
      {"i16", GgufType::kI16, std::int64_t{-32768}},
      {"u32", GgufType::kU32, std::uint64_t{0xFFFFFFFF}},
      {"i32", GgufType::kI32, std::int64_t{-1}},
      {"f32", GgufType::kF32, 1.5},
      {"bool", GgufType::kBool, true},
      {"string", GgufType::kString, std::string("h\u00e9\0llo", 7)},
      {"u64", GgufType::kU64, ~std::uint64_t{0}},
      {"i64", GgufType::kI64, std::int64_t{-5}},
      {"f64", GgufType::kF64, 0.1},
      array_pair("strings", GgufType::kString, {std::string("a"), std::string()}),
      array_pair("floats", GgufType::kF32, {0.5, -2.0}),
      array_pair("numbers", GgufType::kI32, {std::int64_t{-7}, std::int64_t{8}}),
      array_pair("none", GgufType::kU64, {}),
  };
}

void expect_same(const std::vector<GgufPair>& a, const std::vector<GgufPair>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].key, b[i].key);
    EXPECT_EQ(a[i].type, b[i].type) << a[i].key;
    if (a[i].type != GgufType::kArray) {
      EXPECT_EQ(a[i].value, b[i].value) << a[i].key;
      continue;
    }
    const auto& left = *std::get<std::shared_ptr<GgufArray>>(a[i].value);
    const auto& right = *std::get<std::shared_ptr<GgufArray>>(b[i].value);
    EXPECT_EQ(left.element_type, right.element_type) << a[i].key;
    EXPECT_EQ(left.values, right.values) << a[i].key;
  }
}

std::vector<std::uint8_t> bytes(std::size_t n, std::uint8_t value) {
  return std::vector<std::uint8_t>(n, value);
}

class GgufWrite : public ::testing::Test {
 protected:
  Error error_of(const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& e) {
      return e;
    }
    ADD_FAILURE() << "accepted";
    return Error(Errc::kInternal, "accepted");
  }
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(folder_.path()), {}));
  }
  TempFolder folder_;
  std::string path_ = folder_.path("x.gguf");
};

TEST_F(GgufWrite, ReadsBackMetadataAndTensors) {
  std::vector<GgufPair> metadata = all_types();
  metadata.push_back({"general.alignment", GgufType::kU32, std::uint64_t{64}});
  GgufWriter writer(
      path_, metadata,
      {{"a", 0, {3, 5}, 15}, {"empty", 0, {0}, 0}, {"b", 1, {2, 8}, 8}, {"c", 0, {1, 1, 1, 2}, 2}});
  writer.write(bytes(10, 1));  // in two parts
  writer.write(bytes(5, 2));
  writer.write(bytes(8, 3));
  writer.write(bytes(2, 4));
  EXPECT_FALSE(std::filesystem::exists(path_));
  writer.commit();
  EXPECT_EQ(files(), 1u);

  const GgufFile file(path_, &block_size);
  EXPECT_EQ(file.version(), 3u);
  expect_same(file.pairs(), metadata);
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.tensors()[0].shape, (std::vector<std::int64_t>{3, 5}));
  EXPECT_EQ(file.tensors()[0].bytes[9], 1);
  EXPECT_EQ(file.tensors()[0].bytes[10], 2);
  EXPECT_EQ(file.find("b")->type, 1u);
  EXPECT_EQ(file.find("b")->file_offset % 64, 0);
  EXPECT_EQ(file.find("c")->shape, (std::vector<std::int64_t>{1, 1, 1, 2}));
  EXPECT_EQ(file.find("c")->bytes[1], 4);
  EXPECT_EQ(std::filesystem::file_size(path_) % 64, 0u);  // the last tensor is padded too
}

TEST_F(GgufWrite, MetadataAloneIsAFileWithoutTensors) {
  const std::string text = gguf_metadata_bytes(all_types());
  expect_same(parse_gguf_metadata(text, "text"), all_types());
  std::ofstream(path_, std::ios::binary) << text;
  const GgufFile file(path_, &block_size);
  EXPECT_TRUE(file.tensors().empty());
  expect_same(file.pairs(), all_types());
  for (std::size_t n = 0; n < text.size(); ++n) {
    const Error e = error_of([&] { parse_gguf_metadata(text.substr(0, n), "text"); });
    EXPECT_EQ(e.code(), Errc::kCorrupt) << n;
    EXPECT_EQ(e.site().path, "text");
  }
}

TEST_F(GgufWrite, NothingStaysWithoutCommit) {
  std::ofstream(path_) << "old";
  {
    GgufWriter writer(path_, {}, {{"a", 0, {4}, 4}});
    writer.write(bytes(3, 1));
    const Error e = error_of([&] { writer.commit(); });
    EXPECT_EQ(e.code(), Errc::kConfig);
    EXPECT_EQ(e.site().tensor, "a");
    EXPECT_NE(std::string(e.what()).find("3 bytes, expected 4"), std::string::npos);
  }
  EXPECT_EQ(files(), 1u);
  EXPECT_EQ(read_text_file(path_), "old");
  EXPECT_EQ(error_of([&] { GgufWriter(folder_.path("no/x.gguf"), {}, {}); }).code(), Errc::kIo);
}

TEST_F(GgufWrite, DataBeyondATensorIsRefused) {
  GgufWriter writer(path_, {}, {{"a", 0, {4}, 4}, {"b", 0, {4}, 4}});
  const Error e = error_of([&] { writer.write(bytes(5, 1)); });
  EXPECT_EQ(e.code(), Errc::kConfig);
  EXPECT_EQ(e.site().tensor, "a");
  writer.write(bytes(4, 1));
  writer.write(bytes(4, 1));
  EXPECT_EQ(error_of([&] { writer.write(bytes(1, 1)); }).code(), Errc::kConfig);
}

TEST_F(GgufWrite, RefusesByName) {
  struct Case {
    std::vector<GgufPair> metadata;
    std::vector<GgufTensorPlan> tensors;
    const char* says;
    std::string subject;
  };
  const auto u32 = [](const std::string& key, GgufValue value) {
    return GgufPair{key, GgufType::kU32, std::move(value)};
  };
  const std::string long_name(64, 'n');
  const std::int64_t huge = std::int64_t{1} << 40;
  const Case cases[] = {
      {{u32("", std::uint64_t{1})}, {}, "empty", ""},
      {{u32("k", std::uint64_t{1}), u32("k", std::uint64_t{1})}, {}, "twice", "k"},
      {{u32("k", std::uint64_t{1} << 32)}, {}, "too large", "k"},
      {{u32("k", std::int64_t{-1})}, {}, "outside", "k"},
      {{u32("k", 1.0)}, {}, "integer", "k"},
      {{{"k", GgufType::kI8, std::int64_t{128}}}, {}, "outside", "k"},
      {{{"k", GgufType::kString, true}}, {}, "a string", "k"},
      {{{"k", GgufType::kBool, std::uint64_t{1}}}, {}, "a bool", "k"},
      {{{"k", GgufType::kF32, std::int64_t{1}}}, {}, "a number", "k"},
      {{{"k", GgufType::kArray, true}}, {}, "an array", "k"},
      {{array_pair("k", GgufType::kArray, {true})}, {}, "array of arrays", "k"},
      {{array_pair("k", GgufType::kU8, {std::uint64_t{256}})}, {}, "too large", "k"},
      {{u32("general.alignment", std::uint64_t{48})}, {}, "power of two", "general.alignment"},
      {{{"general.alignment", GgufType::kU64, std::uint64_t{32}}}, {}, "u32", "general.alignment"},
      {{}, {{"a", 0, {1}, 1}, {"a", 0, {1}, 1}}, "twice", "a"},
      {{}, {{"", 0, {1}, 1}}, "name is 0 bytes", ""},
      {{}, {{long_name, 0, {1}, 1}}, "name is 64 bytes", long_name},
      {{}, {{"a", 0, {}, 1}}, "0 dimensions", "a"},
      {{}, {{"a", 0, {1, 1, 1, 1, 1}, 1}}, "5 dimensions", "a"},
      {{}, {{"a", 0, {1}, -1}}, "-1 bytes", "a"},
  };
  for (const Case& one : cases) {
    const Error e = error_of([&] { GgufWriter(path_, one.metadata, one.tensors); });
    EXPECT_EQ(e.code(), Errc::kConfig) << one.says;
    EXPECT_EQ(e.site().tensor, one.subject) << e.what();
    EXPECT_NE(std::string(e.what()).find(one.says), std::string::npos) << e.what();
  }
  EXPECT_EQ(error_of([&] {
              GgufWriter(path_, {}, {{"a", 0, {huge, huge}, 1}});
            }).code(),
            Errc::kShape);
  EXPECT_EQ(files(), 0u);
}

}  // namespace
}  // namespace quantal

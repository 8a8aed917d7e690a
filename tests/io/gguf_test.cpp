#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "io/gguf_builder.h"
#include "io/temp_folder.h"
#include "quantal/ggml.h"
#include "quantal/io.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::GgufBuilder;
using testing::golden_path;
using testing::TempFolder;

GgufBlockSize block_size(std::uint32_t type) {
  const GgmlBlock* block = find_ggml_block(type);
  return block == nullptr ? GgufBlockSize{} : GgufBlockSize{block->elements, block->bytes};
}

class Gguf : public ::testing::Test {
 protected:
  std::string write(const std::string& bytes) {
    const std::string path = folder_.path("x.gguf");
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }
  Error error_of(const std::string& bytes) {
    try {
      const GgufFile file(write(bytes), &block_size);
    } catch (const Error& e) {
      return e;
    }
    ADD_FAILURE() << "accepted";
    return Error(Errc::kInternal, "accepted");
  }
  TempFolder folder_;
};

TEST_F(Gguf, ReadsEveryMetadataType) {
  GgufBuilder b;
  b.header(0, 14);
  b.text("u8").u32(0).bytes(200, 1).text("i8").u32(1).bytes(0xFE, 1);
  b.text("u16").u32(2).bytes(65535, 2).text("i16").u32(3).bytes(0x8000, 2);
  b.text("u32").u32(4).u32(0xFFFFFFFFu).text("i32").u32(5).u32(0xFFFFFFFFu);
  b.text("f32").u32(6).u32(0x3FC00000u).text("bool").u32(7).bytes(1, 1);
  b.text("string").u32(8).text("h\u00e9").text("u64").u32(10).u64(~0ull);
  b.text("i64").u32(11).u64(~0ull).text("f64").u32(12).u64(0x3FF8000000000000ull);
  b.text("array").u32(9).u32(8).u64(2).text("a").text("bc");
  b.text("empty").u32(9).u32(4).u64(0);
  const GgufFile file(write(b.str()), &block_size);
  const auto value = [&file](const char* key) { return *file.find_metadata(key); };
  EXPECT_EQ(value("u8"), GgufValue(std::uint64_t{200}));
  EXPECT_EQ(value("i8"), GgufValue(std::int64_t{-2}));
  EXPECT_EQ(value("u16"), GgufValue(std::uint64_t{65535}));
  EXPECT_EQ(value("i16"), GgufValue(std::int64_t{-32768}));
  EXPECT_EQ(value("u32"), GgufValue(std::uint64_t{0xFFFFFFFFu}));
  EXPECT_EQ(value("i32"), GgufValue(std::int64_t{-1}));
  EXPECT_EQ(value("f32"), GgufValue(1.5));
  EXPECT_EQ(value("bool"), GgufValue(true));
  EXPECT_EQ(value("string"), GgufValue(std::string("h\u00e9")));
  EXPECT_EQ(value("u64"), GgufValue(~std::uint64_t{0}));
  EXPECT_EQ(value("i64"), GgufValue(std::int64_t{-1}));
  EXPECT_EQ(value("f64"), GgufValue(1.5));
  const auto array = std::get<std::shared_ptr<GgufArray>>(value("array"));
  ASSERT_EQ(array->values.size(), 2u);
  EXPECT_EQ(array->values[1], GgufValue(std::string("bc")));
  EXPECT_TRUE(std::get<std::shared_ptr<GgufArray>>(value("empty"))->values.empty());
  EXPECT_EQ(file.find_metadata("absent"), nullptr);
}

TEST_F(Gguf, PlacesTensorsByAlignment) {
  GgufBuilder b;
  b.header(2, 1, 2).u32_pair("general.alignment", 64);
  b.tensor("a", {3, 2}, 0, 0).tensor("b", {32}, 3, 64).pad(64);
  b.data(24, 'a').pad(64).data(20, 'b');  // no padding after the last one
  const GgufFile file(write(b.str()), &block_size);
  EXPECT_EQ(file.version(), 2u);
  ASSERT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.tensors()[0].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(file.tensors()[0].bytes.size(), 24u);
  const GgufTensor* second = file.find("b");
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(second->bytes.size(), 20u);
  EXPECT_EQ(second->bytes[0], 'b');
  EXPECT_EQ(second->file_offset % 64, 0);
}

TEST_F(Gguf, RefusesByName) {
  struct Case {
    std::string bytes;
    Errc code;
    const char* says;
    const char* tensor;
  };
  const auto one = [](const std::string& name, const std::vector<std::uint64_t>& dims,
                      std::uint32_t type, std::uint64_t offset, std::size_t data = 256) {
    return GgufBuilder().header(1, 0).tensor(name, dims, type, offset).pad().data(data).str();
  };
  const auto two = [](std::uint64_t first, std::uint64_t second, const std::string& name = "b") {
    GgufBuilder b;
    b.header(2, 0).tensor("a", {2}, 0, first).tensor(name, {2}, 0, second).pad().data(256);
    return b.str();
  };
  const auto aligned = [](std::uint32_t value) {
    return GgufBuilder().header(0, 1).u32_pair("general.alignment", value).pad().str();
  };
  const std::uint64_t huge = std::uint64_t{1} << 62;
  const Case cases[] = {
      {"", Errc::kCorrupt, "rest of the file", ""},
      {"GGUX12345678901234567890", Errc::kCorrupt, "magic", ""},
      {GgufBuilder().header(0, 0, 1).str(), Errc::kUnsupported, "version is 1", ""},
      {GgufBuilder().header(0, 0, 4).str(), Errc::kUnsupported, "version is 4", ""},
      {GgufBuilder().header(0, 0, 0x03000000).str(), Errc::kUnsupported, "big-endian", ""},
      {GgufBuilder().header(~0ull, 0).str(), Errc::kCorrupt, "tensor count", ""},
      {GgufBuilder().header(0, 1ull << 40).str(), Errc::kCorrupt, "metadata count", ""},
      {GgufBuilder().header(0, 1).u32_pair("", 1).str(), Errc::kCorrupt, "empty", ""},
      {GgufBuilder().header(0, 2).u32_pair("k", 1).u32_pair("k", 1).str(), Errc::kCorrupt, "twice",
       "k"},
      {GgufBuilder().header(0, 1).text("key").u32(13).u64(0).str(), Errc::kCorrupt, "type is 13",
       "key"},
      {GgufBuilder().header(0, 1).text("key").u32(7).bytes(2, 1).str(), Errc::kCorrupt, "bool",
       "key"},
      {GgufBuilder().header(0, 1).text("key").u32(8).u64(~0ull).u64(0).str(), Errc::kCorrupt,
       "string", "key"},
      {GgufBuilder().header(0, 1).text("key").u32(9).u32(8).u64(1ull << 61).u64(0).str(),
       Errc::kCorrupt, "array count", "key"},
      {GgufBuilder().header(0, 1).text("key").u32(9).u32(9).u64(1).u64(0).u64(0).str(),
       Errc::kUnsupported, "array of arrays", "key"},
      {aligned(0), Errc::kCorrupt, "power of two", "general.alignment"},
      {aligned(48), Errc::kCorrupt, "power of two", "general.alignment"},
      {GgufBuilder().header(0, 1).string_pair("general.alignment", "32").str(), Errc::kCorrupt,
       "unsigned integer", "general.alignment"},
      {one(std::string(64, 'n'), {4}, 0, 0), Errc::kCorrupt, "64 bytes", ""},
      {one("t", {1, 1, 1, 1, 1}, 0, 0), Errc::kCorrupt, "dimensions is 5", "t"},
      {one("t", {~0ull}, 0, 0), Errc::kCorrupt, "below 2^63", "t"},
      {one("t", {32, huge, 16}, 3, 0), Errc::kCorrupt, "overflows", "t"},
      {one("t", {huge}, 0, 0), Errc::kCorrupt, "overflows", "t"},
      {one("t", {33}, 3, 0), Errc::kCorrupt, "multiple of 32", "t"},
      {one("t", {4}, 4, 0), Errc::kCorrupt, "type is 4", "t"},
      {one("t", {4}, 0, 32), Errc::kCorrupt, "expected 0", "t"},
      {one("t", {4}, 0, 7), Errc::kCorrupt, "expected 0", "t"},
      {one("t", {400}, 0, 0), Errc::kCorrupt, "1600 bytes", "t"},
      {two(0, 0), Errc::kCorrupt, "expected 32", "b"},
      {two(32, 0), Errc::kCorrupt, "expected 0", "a"},
      {two(0, 64), Errc::kCorrupt, "expected 32", "b"},
      {two(0, 32, "a"), Errc::kCorrupt, "twice", "a"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.says);
    const Error e = error_of(c.bytes);
    EXPECT_EQ(errc_name(e.code()), errc_name(c.code));
    EXPECT_NE(std::string(e.what()).find(c.says), std::string::npos) << e.what();
    EXPECT_EQ(e.site().tensor, c.tensor);
    EXPECT_NE(e.site().path.find("x.gguf"), std::string::npos);
  }
}

TEST_F(Gguf, EveryTruncationOfAGoldenFileIsRefused) {
  const std::string source = golden_path("checkpoints/gguf/tiny-q4_0.gguf");
  const std::string path = write(read_text_file(source));
  const GgufFile file(source, &block_size);
  const GgufTensor& last = file.tensors().back();
  const std::size_t needed = static_cast<std::size_t>(last.file_offset) + last.bytes.size();
  const std::size_t header = static_cast<std::size_t>(file.tensors().front().file_offset);
  // From the end to the start: every length within the header, a step of 61 in the data.
  std::filesystem::resize_file(path, needed);
  EXPECT_NO_THROW(GgufFile(path, &block_size));
  for (std::size_t size = needed - 1; size<needed; size -= size> header ? 61 : 1) {
    std::filesystem::resize_file(path, size);
    ASSERT_THROW(GgufFile(path, &block_size), Error) << "length " << size;
  }
}

TEST_F(Gguf, FlippedBitsNeverCrash) {
  const std::string source = golden_path("checkpoints/gguf/tiny-q4_0.gguf");
  const GgufFile file(source, &block_size);
  const std::size_t header = static_cast<std::size_t>(file.tensors().front().file_offset);
  std::string bytes = read_text_file(source);
  const unsigned seed = 20261123;
  std::mt19937 random(seed);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::size_t at = random() % header;
    const char flipped = static_cast<char>(1 << random() % 8);
    bytes[at] = static_cast<char>(bytes[at] ^ flipped);
    try {
      const GgufFile changed(write(bytes), &block_size);
    } catch (const Error&) {
      ++refused;
    }
    bytes[at] = static_cast<char>(bytes[at] ^ flipped);
  }
  // Most of the header is free text (tokens), where a flip is still a valid file.
  EXPECT_GT(refused, 50) << "seed " << seed;
  EXPECT_LT(refused, 2000) << "seed " << seed;
}

}  // namespace
}  // namespace quantal

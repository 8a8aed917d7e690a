#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "io/temp_folder.h"
#include "quantal/io.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::golden_path;
using testing::TempFolder;

/// A file made of a header text and data bytes.
std::string file_of(const std::string& header, const std::string& data = "") {
  std::string out(8, '\0');
  const std::uint64_t n = header.size();
  std::memcpy(out.data(), &n, sizeof n);
  return out + header + data;
}

Error error_of(const std::string& path) {
  try {
    const SafetensorsFile file(path);
  } catch (const Error& e) {
    return e;
  }
  ADD_FAILURE() << path << " was accepted";
  return Error(Errc::kInternal, "accepted");
}

TEST(Safetensors, VerdictsEqualTheReferenceReader) {
  std::ifstream in(golden_path("containers/safetensors_verdicts.json"));
  const auto verdicts = nlohmann::json::parse(in).at("verdict");
  ASSERT_GE(verdicts.size(), 20u);
  for (const auto& [name, verdict] : verdicts.items()) {
    const std::string path = golden_path("containers/" + name);
    const std::string text = verdict.get<std::string>();
    if (text.starts_with("rejected") || name == "bad_dup_key.safetensors") {
      // The reference accepts duplicate names (the last one wins); its README forbids them.
      const Error e = error_of(path);
      EXPECT_EQ(e.code(), Errc::kCorrupt) << name;
      EXPECT_EQ(e.site().path, path);
      EXPECT_GE(e.site().offset, 0) << name;
      continue;
    }
    SCOPED_TRACE(name);
    const SafetensorsFile file(path);
    std::string names;
    std::map<std::string, int> sorted;
    for (const auto& tensor : file.tensors()) sorted[tensor.first] = 1;
    for (const auto& entry : sorted) names += (names.empty() ? "" : ",") + entry.first;
    EXPECT_EQ("accepted: " + names, text);
  }
}

TEST(Safetensors, GoodFileHasItsValues) {
  const SafetensorsFile file(golden_path("containers/good.safetensors"));
  const TensorView* zeta = file.find("zeta_u8");
  ASSERT_NE(zeta, nullptr);
  EXPECT_EQ(zeta->dtype, DType::kU8);
  EXPECT_EQ(file.find("absent"), nullptr);
}

TEST(Safetensors, RefusesWithTensorAndOffset) {
  const TempFolder folder;
  const std::string path = folder.path("lie.safetensors");
  struct Case {
    const char* header;
    std::string data;
    const char* says;
  };
  const Case cases[] = {
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "abcd", "expected 8"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "abcdefgh", "expected 0"},
      {R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", "abcd", "1.0"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", "", "data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", "abcd", "3 numbers"},
      {R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "a", "twice"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", "a", "2^63"},
      {R"({"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,1]}})", "a", "9999"},
      {R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,1]}})", "a",
       "2^63"},
      {R"({"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}})", "a", "object"},
      {R"({"a":[]})", "", "array"},
      {R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", "a", "array"},
      {R"([1])", "", "array"},
      {R"(7)", "", "7"},
      {R"({"__metadata__":{"k":{}}})", "", "metadata"},
      {R"({} x)", "", "JSON"},
      {"\xEF\xBB\xBF{}", "", "byte order mark"},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(one.header);
    std::ofstream(path, std::ios::binary) << file_of(one.header, one.data);
    const Error e = error_of(path);
    EXPECT_EQ(e.code(), Errc::kCorrupt);
    EXPECT_NE(std::string(e.what()).find(one.says), std::string::npos) << e.what();
    EXPECT_GE(e.site().offset, 0);
  }
}

TEST(Safetensors, SixtyFourDimensionsAreEnough) {
  const TempFolder folder;
  const std::string path = folder.path("dims.safetensors");
  const auto write = [&](int dims) {
    std::string shape = "1";
    for (int i = 1; i < dims; ++i) shape += ",1";
    std::ofstream(path, std::ios::binary)
        << file_of(R"({"a":{"dtype":"U8","shape":[)" + shape + R"(],"data_offsets":[0,1]}})", "a");
  };
  write(64);
  EXPECT_EQ(SafetensorsFile(path).find("a")->shape.size(), 64u);
  write(65);
  const Error e = error_of(path);
  EXPECT_EQ(e.code(), Errc::kCorrupt);
  EXPECT_EQ(e.site().tensor, "a");
}

TEST(Safetensors, UnknownTypesAreNamed) {
  const TempFolder folder;
  const std::string path = folder.path("type.safetensors");
  for (const char* type : {"", "f32", "F31", "F32 ", "float32", "F32\\u0000", "Q4_0", "\\u00e9"}) {
    SCOPED_TRACE(type);
    std::ofstream(path, std::ios::binary) << file_of(
        R"({"a":{"dtype":")" + std::string(type) + R"(","shape":[1],"data_offsets":[0,4]}})",
        "abcd");
    const Error e = error_of(path);
    EXPECT_NE(e.code(), Errc::kInternal);
    EXPECT_EQ(e.site().tensor, "a");
    EXPECT_NE(std::string(e.what()).find("dtype"), std::string::npos) << e.what();
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string whole = read_text_file(golden_path("containers/good.safetensors"));
  const TempFolder folder;
  const std::string path = folder.path("cut.safetensors");
  std::ofstream(path, std::ios::binary) << whole;
  for (std::size_t size = whole.size(); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    ASSERT_EQ(error_of(path).code(), Errc::kCorrupt) << "length " << size;
  }
}

TEST(Safetensors, FlippedBitsNeverCrash) {
  const std::string whole = read_text_file(golden_path("containers/good.safetensors"));
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  const TempFolder folder;
  const std::string path = folder.path("flipped.safetensors");
  int refused = 0;
  for (std::size_t bit = 0; bit < 8 * (8 + header); ++bit) {
    std::string bytes = whole;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
    std::ofstream(path, std::ios::binary) << bytes;
    try {
      const SafetensorsFile file(path);
      for (const auto& tensor : file.tensors()) {
        // What is still accepted (another name, another type of the same size) is consistent.
        ASSERT_EQ(static_cast<std::size_t>(tensor.second.numel()) * dtype_size(tensor.second.dtype),
                  tensor.second.bytes.size());
      }
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 500);  // of about 2000: most flips break JSON, a shape or an offset
}

TEST(Safetensors, ForeignDtypeIsUnsupportedByName) {
  const TempFolder folder;
  const std::string path = folder.path("f4.safetensors");
  std::ofstream(path, std::ios::binary)
      << file_of(R"({"half_byte":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", "a");
  const Error e = error_of(path);
  EXPECT_EQ(e.code(), Errc::kUnsupported);
  EXPECT_EQ(e.site().tensor, "half_byte");
}

TEST(Safetensors, SkipsUnknownFieldsAtAnyDepth) {
  const TempFolder folder;
  const std::string path = folder.path("deep.safetensors");
  std::ofstream(path, std::ios::binary)
      << file_of(R"({"a":{"more":{"dtype":[1,{"shape":[-1.5]}],"x":"y"},"dtype":"U8","shape":[2],)"
                 R"("data_offsets":[0,2],"and":[null,true,[]]}})",
                 "ab");
  const SafetensorsFile file(path);
  ASSERT_NE(file.find("a"), nullptr);
  EXPECT_EQ(file.find("a")->shape, std::vector<std::int64_t>{2});
}

TEST(Safetensors, WriterOrdersPadsAndReadsBack) {
  const TempFolder folder;
  const std::string path = folder.path("out.safetensors");
  Tensor half = make_tensor(DType::kBF16, {3});
  Tensor wide = make_tensor(DType::kF64, {1, 2});
  Tensor byte = make_tensor(DType::kU8, {});
  half.bytes = {1, 2, 3, 4, 5, 6};
  byte.bytes = {9};
  const std::vector<std::pair<std::string, TensorView>> tensors = {
      {"b", byte.view()}, {"a \"quoted\" \u00e9", half.view()}, {"a", wide.view()}};
  write_safetensors(path, tensors, {{"format", "pt"}});

  const SafetensorsFile file(path);
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.tensors()[0].first, "a");  // f64 first, then bf16, then u8
  EXPECT_EQ(file.tensors()[1].first, "a \"quoted\" \u00e9");
  EXPECT_EQ(file.tensors()[2].first, "b");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  const TensorView& read = file.tensors()[1].second;
  EXPECT_EQ(std::vector<std::uint8_t>(read.bytes.begin(), read.bytes.end()), half.bytes);
  EXPECT_TRUE(file.tensors()[2].second.shape.empty());
  // The data area begins at a multiple of 8 and nothing temporary stays behind.
  const MappedFile raw(path);
  std::uint64_t header = 0;
  std::memcpy(&header, raw.bytes().data(), sizeof header);
  EXPECT_EQ(header % 8, 0u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(Safetensors, WriterKeepsTheBytesOfTheReferenceWriter) {
  // good.safetensors was written by the reference; writing its tensors again gives the same file.
  const std::string source = golden_path("containers/good.safetensors");
  const SafetensorsFile file(source);
  const TempFolder folder;
  write_safetensors(folder.path("again.safetensors"), file.tensors(), file.metadata());
  EXPECT_EQ(read_text_file(folder.path("again.safetensors")), read_text_file(source));
}

TEST(Safetensors, WriterRefusesAndLeavesTheTargetAlone) {
  const TempFolder folder;
  const std::string path = folder.path("kept.safetensors");
  std::ofstream(path) << "kept";
  const Tensor byte = make_tensor(DType::kU8, {1});
  using List = std::vector<std::pair<std::string, TensorView>>;
  EXPECT_THROW(write_safetensors(path, List{{"a", byte.view()}, {"a", byte.view()}}), Error);
  EXPECT_THROW(write_safetensors(path, List{{"__metadata__", byte.view()}}), Error);
  EXPECT_THROW(write_safetensors(path, List{{"bad\xff", byte.view()}}), Error);
  TensorView lying = byte.view();
  lying.shape = {2};
  EXPECT_THROW(write_safetensors(path, List{{"a", lying}}), Error);
  EXPECT_THROW(write_safetensors(folder.path("no/such/folder/x"), List{}), Error);
  EXPECT_EQ(read_text_file(path), "kept");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

}  // namespace
}  // namespace quantal

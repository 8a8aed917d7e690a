// Files that promise more than they hold: no reader takes memory for the promise. The bound is a
// multiple of the file's own size.
#include "support/allocation.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "io/archive_builder.h"
#include "io/gguf_builder.h"
#include "io/read_error.h"
#include "quantal/archive.h"
#include "quantal/ggml.h"
#include "quantal/io.h"

namespace quantal {
namespace {

using testing::AllocationPeak;
using testing::deflated_entry;
using testing::GgufBuilder;
using testing::le;
using testing::p_global;
using testing::p_int;
using testing::p_text;
using testing::p_tuple;
using testing::stored_entry;
using testing::TensorPickle;
using testing::torch_entries;
using testing::zip_of;
using testing::ZipEntry;

constexpr std::size_t kTimes = 32;           // of the file: records of names and shapes
constexpr std::size_t kTimesOfPickle = 128;  // an opcode of one byte makes a value
constexpr std::size_t kAlways = 512 << 10;   // small buffers, messages, zlib's window

std::string repeated(const std::string& text, std::size_t times) {
  std::string out;
  out.reserve(text.size() * times);
  for (std::size_t i = 0; i < times; ++i) out += text;
  return out;
}

class Allocation : public ::testing::Test {
 protected:
  /// `read` refuses `bytes` with a typed error or takes them; memory stays in the file's class.
  void bounded(const std::string& what, const std::string& bytes,
               const std::function<void(const std::string& path)>& read,
               std::size_t times = kTimes) {
    SCOPED_TRACE(what);
    const std::string path = testing::write_bytes(folder_, "x", bytes);
    const AllocationPeak peak;
    try {
      read(path);
    } catch (const Error& e) {
      EXPECT_EQ(e.site().path, path) << e.what();
    }
    EXPECT_LE(peak.bytes(), times * bytes.size() + kAlways) << bytes.size() << " bytes of file";
  }
  testing::TempFolder folder_;
};

TEST_F(Allocation, Safetensors) {
  const auto check = [this](const std::string& what, const std::string& header,
                            const std::string& length = "") {
    bounded(what, (length.empty() ? le(header.size(), 8) : length) + header,
            [](const std::string& path) { SafetensorsFile{path}; });
  };
  for (const std::uint64_t length : {std::uint64_t{1} << 26, std::uint64_t{1} << 40,
                                     std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    check("length of the header", "{}", le(length, 8));
  }
  const auto tensor = [](const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  check("a huge tensor", tensor("[1099511627776]", "[0,4398046511104]"));
  check("more than 2^63 bytes", tensor("[4294967296,4294967296]", "[0,4]"));
  check("many dimensions", tensor("[" + repeated("1,", 1 << 19) + "1]", "[0,4]"));
  check("many offsets", tensor("[1]", "[" + repeated("0,", 1 << 19) + "4]"));
  check("deep nesting", R"({"a":{"x":)" + std::string(1 << 20, '['));
  check("deep nesting of names", repeated(R"({"a":)", 1 << 18));
  check("long name", "{\"" + std::string(1 << 20, 'n') + "\":7}");
  std::string many = "{";
  for (int i = 0; i < 20000; ++i) {
    many += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
            R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  check("many tensors", many + "}");
}

TEST_F(Allocation, NpyAndNpz) {
  const auto npy = [](const std::string& shape, const std::string& data) {
    const std::string header =
        "{'descr': '<f4', 'fortran_order': True, 'shape': " + shape + ", }\n";
    return "\x93NUMPY" + le(2, 1) + le(0, 1) + le(header.size(), 4) + header + data;
  };
  const std::string shapes[] = {"(1099511627776,)", "(4294967296, 4294967296)",
                                "(9223372036854775807,)", "(" + repeated("1,", 20000) + ")",
                                "(1, 1, 1, 1)"};
  for (const std::string& shape : shapes) {
    const std::string bytes = npy(shape, "abcd");
    bounded("npy", bytes, [](const std::string& path) { read_npy(path); });
    for (const bool deflate : {false, true}) {
      const auto entry = deflate ? deflated_entry : stored_entry;
      bounded("npz", zip_of({entry("a.npy", bytes)}), [](const std::string& path) {
        const NpzFile file(path);
        for (const TensorInfo& info : file.tensors()) file.read(info.name);
      });
    }
  }
  bounded("npy header length", "\x93NUMPY" + le(2, 1) + le(0, 1) + le(0xFFFFFFF0, 4),
          [](const std::string& path) { read_npy(path); });
}

TEST_F(Allocation, ZipBombs) {
  const auto read = [](const std::string& path) {
    const NpzFile file(path);
    for (const TensorInfo& info : file.tensors()) file.read(info.name);
  };
  // A stream of 40 bytes whose directory and array header promise 40 kB of it: 1032 for one.
  ZipEntry liar = deflated_entry("a.npy", std::string(100, 'x'));
  liar.size = liar.packed * 1032;
  bounded("a stream that ends early", zip_of({liar}), read);
  // Honest streams of zeros, 1000 to 1: together they are refused.
  const std::string zeros(std::size_t{24} << 20, '\0');
  const ZipEntry part = deflated_entry("a.npy", zeros);
  std::vector<ZipEntry> bomb;
  for (int i = 0; i < 4; ++i) {
    bomb.push_back(part);
    bomb.back().name = std::to_string(i) + ".npy";
  }
  bounded("many streams of zeros", zip_of(bomb), read);
  const std::string path = testing::write_bytes(folder_, "bomb.npz", zip_of(bomb));
  testing::expect_error([&] { NpzFile{path}; }, Errc::kUnsupported, "zip bomb");
}

TEST_F(Allocation, Gguf) {
  const auto check = [this](const std::string& what, const GgufBuilder& b) {
    bounded(what, b.str(), [](const std::string& path) {
      GgufFile(path, [](std::uint32_t type) {
        const GgmlBlock* block = find_ggml_block(type);
        return block == nullptr ? GgufBlockSize{} : GgufBlockSize{block->elements, block->bytes};
      });
    });
  };
  const std::uint64_t huge = std::uint64_t{1} << 62;
  check("tensors", GgufBuilder().header(huge, 0));
  check("pairs", GgufBuilder().header(0, huge));
  check("text", GgufBuilder().header(0, 1).text("k").u32(8).u64(huge).u64(0));
  check("key", GgufBuilder().header(0, 1).u64(huge).u64(0));
  check("array", GgufBuilder().header(0, 1).text("k").u32(9).u32(8).u64(huge).u64(0));
  check("dimensions", GgufBuilder().header(1, 0).text("t").u32(0xFFFFFFFF).u64(1).u64(1));
  check("a huge tensor", GgufBuilder().header(1, 0).tensor("t", {huge}, 24, 0).pad().data(64));
  check("two halves", GgufBuilder().header(1, 0).tensor("t", {1 << 30, 1 << 30}, 0, 0).pad());
  // Elements take more memory than their byte: not more than 2^24 of them in a file.
  GgufBuilder many;
  many.header(0, 3);
  for (const char* key : {"a", "b", "c"}) {
    many.text(key).u32(9).u32(0).u64(6 << 20).data(6 << 20);
  }
  const std::string path = testing::write_bytes(folder_, "many.gguf", many.str());
  testing::expect_error([&] { GgufFile(path, nullptr); }, Errc::kCorrupt, "array count");
}

TEST_F(Allocation, Torch) {
  const auto check = [this](const std::string& what, const std::string& body) {
    bounded(
        what, zip_of(torch_entries(body, {std::string(24, '\0')})),
        [](const std::string& path) { TorchFile{path}; }, kTimesOfPickle);
  };
  TensorPickle t;
  t.numel = std::uint64_t{1} << 60;
  check("a huge storage", t.text());
  t = {};
  t.shape = p_tuple({std::uint64_t{1} << 40, 2});
  t.strides = p_tuple({0, 1});
  check("a view without strides", t.text());
  t.shape = p_tuple(std::vector<std::uint64_t>(100000, 1));
  check("many dimensions", t.text());
  check("a memo of 2^32", "Nr" + le(0xFFFFFFFF, 4));
  check("a text of 2^32", "X" + le(0xFFFFFFFF, 4));
  check("an integer of 255 bytes", "\x8a\xFF");
  check("deep lists", std::string(1 << 18, ']') + std::string((1 << 18) - 1, 'a'));
  check("marks", std::string(1 << 18, '('));
  check("values", std::string(1 << 18, 'N'));
  std::string laughs = "]";
  for (char i = 0; i < 60; ++i) laughs += std::string("q") + i + "h" + i + "\x86";
  check("sharing", laughs);
  std::string texts = p_text(std::string(1000, 't')) + "q\x01]";
  for (int i = 0; i < 20000; ++i)
    texts +=
        "h\x01"
        "a";
  check("one text many times", texts);
  std::string dicts = "]";
  for (int i = 0; i < 20000; ++i) dicts += "}a";
  check("many dictionaries", dicts);
}

}  // namespace
}  // namespace quantal

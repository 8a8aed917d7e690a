#include <gtest/gtest.h>

#include <cstring>

#include "io/archive_builder.h"
#include "io/read_error.h"
#include "quantal/archive.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::deflated_entry;
using testing::expect_error;
using testing::golden_path;
using testing::le;
using testing::read_bytes;
using testing::stored_entry;
using testing::TempFolder;
using testing::write_bytes;
using testing::zip_of;
using testing::ZipEntry;

std::string npy(const std::string& header, const std::string& data) {
  return "\x93NUMPY" + le(1, 1) + le(0, 1) + le(header.size(), 2) + header + data;
}
std::string npy_of(const std::string& descr, bool fortran, const std::string& shape,
                   const std::string& data) {
  return npy("{'descr': '" + descr + "', 'fortran_order': " + (fortran ? "True" : "False") +
                 ", 'shape': " + shape + ", }\n",
             data);
}

class Npz : public ::testing::Test {
 protected:
  NpzFile open(const std::string& bytes) { return NpzFile(write_bytes(folder_, "x.npz", bytes)); }
  void refuses(const std::vector<ZipEntry>& entries, Errc code, const std::string& part) {
    expect_error([&] { open(zip_of(entries)); }, code, part);
  }
  TempFolder folder_;
};

template <class T>
std::vector<T> values(const HeldTensor& held) {
  std::vector<T> out(held.view.bytes.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), held.view.bytes.data(), held.view.bytes.size());
  return out;
}

TEST_F(Npz, GoldenStored) {
  const NpzFile file(golden_path("containers/stored.npz"));
  ASSERT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.tensors()[0].name, "w");
  EXPECT_EQ(file.tensors()[1].name, "model.layers.0.x");
  EXPECT_EQ(file.tensors()[1].dtype, DType::kF16);
  EXPECT_EQ(file.tensors()[1].shape, (std::vector<std::int64_t>{2, 2}));
  const auto w = values<std::uint32_t>(file.read("w"));
  ASSERT_EQ(w.size(), 6u);
  for (std::size_t i = 0; i < w.size(); ++i) EXPECT_EQ(w[i], i);
  EXPECT_EQ(file.find("nothing"), nullptr);
  expect_error([&] { file.read("nothing"); }, Errc::kConfig, "not in the file");
}

TEST_F(Npz, GoldenDeflated) {
  const NpzFile file(golden_path("containers/deflated.npz"));
  ASSERT_EQ(file.tensors().size(), 1u);
  EXPECT_EQ(file.tensors()[0].shape, (std::vector<std::int64_t>{1000}));
  EXPECT_EQ(values<float>(file.read("w")), std::vector<float>(1000, 0.0f));
}

TEST_F(Npz, GoldenMlxWeights) {
  const NpzFile file(golden_path("checkpoints/mlx-npz/weights.npz"));
  const NpzFile again(golden_path("checkpoints/layout-mlx-dir/mlx_model.npz"));
  EXPECT_GT(file.tensors().size(), 30u);
  for (const TensorInfo& info : file.tensors()) {
    SCOPED_TRACE(info.name);
    const HeldTensor held = file.read(info.name);
    EXPECT_EQ(held.view.shape, info.shape);
    EXPECT_EQ(held.view.bytes.size(),
              static_cast<std::size_t>(held.view.numel()) * dtype_size(info.dtype));
    ASSERT_NE(again.find(info.name), nullptr);
    EXPECT_EQ(values<std::uint8_t>(held), values<std::uint8_t>(again.read(info.name)));
  }
}

TEST_F(Npz, PutsElementsInOrder) {
  const std::string big = {0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6};
  const std::string little = {1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0};
  for (const bool deflate : {false, true}) {
    const auto entry = deflate ? deflated_entry : stored_entry;
    const NpzFile file = open(zip_of({entry("big.npy", npy_of(">u2", false, "(2, 3)", big)),
                                      entry("fortran.npy", npy_of("<u2", true, "(2, 3)", little)),
                                      entry("both.npy", npy_of(">u2", true, "(2, 3)", big)),
                                      entry("flat.npy", npy_of("<u2", true, "(6, )", little)),
                                      entry("no suffix", npy_of("<u2", false, "(6,)", little))}));
    const std::vector<std::uint16_t> plain = {1, 2, 3, 4, 5, 6}, columns = {1, 3, 5, 2, 4, 6};
    EXPECT_EQ(values<std::uint16_t>(file.read("big")), plain);
    EXPECT_EQ(values<std::uint16_t>(file.read("fortran")), columns);
    EXPECT_EQ(values<std::uint16_t>(file.read("both")), columns);
    EXPECT_EQ(values<std::uint16_t>(file.read("flat")), plain);
    EXPECT_EQ(values<std::uint16_t>(file.read("no suffix")), plain);
  }
}

TEST_F(Npz, WriterIsReadInPlace) {
  const std::string path = folder_.path("out.npz");
  Tensor a = make_tensor(DType::kF32, {3, 5});
  for (std::size_t i = 0; i < a.bytes.size(); ++i) a.bytes[i] = static_cast<std::uint8_t>(i);
  const Tensor scalar = make_tensor(DType::kBool, {});
  const Tensor empty = make_tensor(DType::kBF16, {0, 4});
  NpzWriter writer(path);
  writer.put("layer.weight", a.view());
  writer.put("scalar", scalar.view());
  writer.put("empty", empty.view());
  expect_error([&] { writer.put("scalar", a.view()); }, Errc::kConfig, "given twice");
  expect_error([&] { writer.put("/x", a.view()); }, Errc::kConfig, "member name");
  expect_error([&] { writer.put("e", make_tensor(DType::kF8E4M3, {1}).view()); }, Errc::kDtype,
               "f8e4m3");
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.finish();
  const NpzFile file(path);
  ASSERT_EQ(file.tensors().size(), 3u);
  const HeldTensor held = file.read("layer.weight");
  EXPECT_EQ(held.view.shape, a.shape);
  EXPECT_EQ(values<std::uint8_t>(held), a.bytes);
  // The same address twice: a view of the mapping, not a copy.
  EXPECT_EQ(held.view.bytes.data(), file.read("layer.weight").view.bytes.data());
  EXPECT_EQ(file.find("empty")->dtype, DType::kBF16);
  EXPECT_EQ(file.read("empty").view.numel(), 0);
  EXPECT_TRUE(file.find("scalar")->shape.empty());
}

TEST_F(Npz, CommentsAreKept) {
  EXPECT_EQ(NpzFile(golden_path("containers/stored.npz")).comment(), "");
  const std::string path = folder_.path("out.npz");
  for (const std::string& comment :
       {std::string(), std::string("{\"a\": 1}"), std::string(NpzWriter::kMostComment, 'x')}) {
    NpzWriter writer(path);
    writer.put("w", make_tensor(DType::kF32, {3}).view());
    writer.finish(comment);
    const NpzFile file(path);
    EXPECT_EQ(file.comment(), comment);
    EXPECT_EQ(file.read("w").view.numel(), 3);
  }
  NpzWriter writer(folder_.path("long.npz"));
  expect_error([&] { writer.finish(std::string(NpzWriter::kMostComment + 1, 'x')); }, Errc::kConfig,
               "comment is 65536 bytes");
  EXPECT_FALSE(std::filesystem::exists(folder_.path("long.npz")));
}

TEST_F(Npz, TheViewOutlivesTheFile) {
  HeldTensor held;
  {
    const NpzFile file(golden_path("containers/stored.npz"));
    held = file.read("w");
  }
  EXPECT_EQ(values<std::uint32_t>(held)[5], 5u);
}

TEST_F(Npz, RefusesBadInput) {
  const std::string good = npy_of("<u2", false, "(2,)", "abcd");
  refuses({stored_entry("a.npy", good), stored_entry("a", good)}, Errc::kCorrupt, "stands twice");
  refuses({stored_entry("a.npy", "PK")}, Errc::kCorrupt, "\\x93NUMPY");
  refuses({stored_entry("a.npy", npy_of("|O", false, "(2,)", "abcd"))}, Errc::kUnsupported,
          "descr");
  for (const bool deflate : {false, true}) {
    const auto entry = deflate ? deflated_entry : stored_entry;
    refuses({entry("a.npy", npy_of("<u2", false, "(3,)", "abcd"))}, Errc::kCorrupt,
            "data is 4 bytes, expected 6");
    refuses({entry("a.npy", npy_of("<u2", false, "(4294967296, 4294967296)", "abcd"))},
            Errc::kCorrupt, "overflows");
    refuses({entry("a.npy", npy_of("<f8", false, "(1152921504606846975,)", "abcd"))},
            Errc::kCorrupt, "expected 9223372036854775800");
    ZipEntry wrong = entry("a.npy", good);
    wrong.crc ^= 4;
    const NpzFile file = open(zip_of({wrong}));
    expect_error([&] { file.read("a"); }, Errc::kCorrupt, "CRC-32");
  }
  std::string dims = "(";
  for (int i = 0; i < 40000; ++i) dims += "1,";
  refuses({stored_entry("a.npy", npy("{'shape': " + dims, ""))}, Errc::kCorrupt, "npy: header");
  std::string braces(60000, '(');
  refuses({stored_entry("a.npy", npy("{'shape': " + braces, ""))}, Errc::kCorrupt, "integer >= 0");
}

TEST_F(Npz, EveryTruncationAndFlipIsSafe) {
  for (const char* name : {"stored", "deflated"}) {
    const std::string bytes = read_bytes(golden_path("containers/" + std::string(name) + ".npz"));
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      EXPECT_THROW(open(bytes.substr(0, n)), Error) << n;
    }
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      std::string flipped = bytes;
      flipped[i] = static_cast<char>(flipped[i] ^ (1 << (i % 8)));
      try {
        const NpzFile file = open(flipped);
        for (const TensorInfo& info : file.tensors()) file.read(info.name);
      } catch (const Error&) {
      }
    }
  }
}

}  // namespace
}  // namespace quantal

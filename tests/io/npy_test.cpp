#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "io/temp_folder.h"
#include "quantal/io.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::golden_path;
using testing::TempFolder;

std::string npy(const std::string& header, const std::string& data, char major = 1) {
  std::string out = "\x93NUMPY";
  out += major;
  out += '\0';
  out += static_cast<char>(header.size() & 0xFF);
  out += static_cast<char>(header.size() >> 8);
  if (major > 1) out.append(2, '\0');
  return out + header + data;
}

class Npy : public ::testing::Test {
 protected:
  std::string write(const std::string& bytes) {
    const std::string path = folder_.path("x.npy");
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }
  Errc code_of(const std::string& bytes) {
    try {
      read_npy(write(bytes));
    } catch (const Error& e) {
      EXPECT_NE(e.site().path.find("x.npy"), std::string::npos);
      return e.code();
    }
    return Errc::kInternal;
  }
  TempFolder folder_;
};

template <class T>
std::vector<T> values(const Tensor& tensor) {
  std::vector<T> out(tensor.bytes.size() / sizeof(T));
  std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
  return out;
}

TEST_F(Npy, GoldenFiles) {
  std::vector<float> counting(12);
  for (std::size_t i = 0; i < counting.size(); ++i) counting[i] = static_cast<float>(i);
  for (const char* name : {"c_order", "f_order"}) {
    SCOPED_TRACE(name);
    const Tensor t = read_npy(golden_path("containers/" + std::string(name) + ".npy"));
    EXPECT_EQ(t.dtype, DType::kF32);
    EXPECT_EQ(t.shape, (std::vector<std::int64_t>{3, 4}));
    EXPECT_EQ(values<float>(t), counting);
  }
  const Tensor big = read_npy(golden_path("containers/big_endian.npy"));
  EXPECT_EQ(big.dtype, DType::kI16);
  EXPECT_EQ(values<std::int16_t>(big), (std::vector<std::int16_t>{0, 1, 2, 3, 4}));
}

TEST_F(Npy, WriterKeepsTheBytesOfNumpy) {
  const std::string source = golden_path("containers/c_order.npy");
  const Tensor t = read_npy(source);
  write_npy(folder_.path("again.npy"), t.view());
  EXPECT_EQ(read_text_file(folder_.path("again.npy")), read_text_file(source));
}

TEST_F(Npy, RoundTripOfEveryTypeAndRank) {
  const std::vector<std::vector<std::int64_t>> shapes = {{}, {5}, {0, 3}, {2, 3, 4}};
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kF64, DType::kU8, DType::kI8, DType::kU16,
        DType::kI16, DType::kU32, DType::kI32, DType::kU64, DType::kI64, DType::kBool}) {
    for (const auto& shape : shapes) {
      Tensor t = make_tensor(dtype, shape);
      for (std::size_t i = 0; i < t.bytes.size(); ++i) t.bytes[i] = static_cast<std::uint8_t>(i);
      write_npy(folder_.path("t.npy"), t.view());
      const Tensor back = read_npy(folder_.path("t.npy"));
      EXPECT_EQ(back.dtype, dtype);
      EXPECT_EQ(back.shape, shape);
      EXPECT_EQ(back.bytes, t.bytes);
    }
  }
  EXPECT_THROW(write_npy(folder_.path("t.npy"), make_tensor(DType::kF8E4M3, {1}).view()), Error);
}

TEST_F(Npy, AcceptsOtherSpellings) {
  const Tensor a =
      read_npy(write(npy("{\"shape\":(2,3,),'descr':'|u1','fortran_order':False}", "abcdef", 3)));
  EXPECT_EQ(a.shape, (std::vector<std::int64_t>{2, 3}));
  const Tensor b =
      read_npy(write(npy("{'descr': '<V2', 'fortran_order': True, 'shape': (1,)}", "ab")));
  EXPECT_EQ(b.dtype, DType::kBF16);
}

TEST_F(Npy, RefusesBadInput) {
  const auto dict = [](const std::string& descr, const std::string& shape) {
    return "{'descr': " + descr + ", 'fortran_order': False, 'shape': " + shape + ", }\n";
  };
  EXPECT_EQ(code_of(""), Errc::kCorrupt);
  EXPECT_EQ(code_of("not numpy at all"), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(1,)"), "abcd", 9)), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("'|O'", "(1,)"), "abcdefgh")), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("'<c8'", "(1,)"), "abcdefgh")), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("'<U1'", "(1,)"), "abcd")), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("'|f4'", "(1,)"), "abcd")), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("[('a', '<f4')]", "(1,)"), "abcd")), Errc::kUnsupported);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(2,)"), "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(1,)"), "abcde")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(-1,)"), "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(1"), "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(9223372036854775808,)"), "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f8'", "(4294967296, 4294967296)"), "abcd")), Errc::kCorrupt);
  std::string ones = "(";
  for (int i = 0; i < 64; ++i) ones += "1,";
  EXPECT_EQ(read_npy(write(npy(dict("'<f4'", ones + ")"), "abcd"))).shape.size(), 64u);
  EXPECT_EQ(code_of(npy(dict("'<f4'", ones + "1)"), "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy("{'descr': '<f4'}", "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy("{'descr': '<f4', 'descr': '<f4', 'shape': ()}", "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy("{'color': '<f4'}", "abcd")), Errc::kCorrupt);
  EXPECT_EQ(code_of(npy(dict("'<f4'", "(1,)") + "x", "abcd")), Errc::kCorrupt);
}

TEST_F(Npy, EveryTruncationIsRefused) {
  const std::string whole = read_text_file(golden_path("containers/c_order.npy"));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    ASSERT_NE(code_of(whole.substr(0, size)), Errc::kInternal) << "length " << size;
  }
}

TEST_F(Npy, FlippedBitsNeverCrash) {
  const std::string whole = read_text_file(golden_path("containers/c_order.npy"));
  int refused = 0;
  for (std::size_t bit = 0; bit < 8 * 128; ++bit) {
    std::string bytes = whole;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
    refused += code_of(bytes) != Errc::kInternal;
  }
  EXPECT_GT(refused, 600);  // the padding of the header is refused as well
}

}  // namespace
}  // namespace quantal

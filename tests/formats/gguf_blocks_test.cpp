#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "quantal/ggml.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::GoldenBook;

GgmlType type_named(const std::string& name) {
  for (std::uint32_t type = 0; type < 64; ++type) {
    const GgmlBlock* block = find_ggml_block(type);
    if (block != nullptr && block->name == name) return block->type;
  }
  throw std::runtime_error("no ggml type is called " + name);
}

TEST(GgufBlocks, DecodingEqualsUpstreamBitForBit) {
  const GoldenBook book("gguf_blocks");
  std::set<std::string> seen;
  for (const auto& one : book.cases()) {
    const std::string name = one.at("type").get<std::string>();
    SCOPED_TRACE(name);
    seen.insert(name);
    const TensorView& raw = book.field(one, "raw");
    const TensorView& expected = book.field(one, "dequantized");
    const GgmlType type = type_named(name);
    const GgmlBlock& block = *find_ggml_block(static_cast<std::uint32_t>(type));
    const std::int64_t n = expected.numel();
    ASSERT_EQ(static_cast<std::int64_t>(raw.bytes.size()), n / block.elements * block.bytes);
    std::vector<float> out(static_cast<std::size_t>(n));
    decode_ggml(type, raw.bytes.data(), n, out.data());
    EXPECT_EQ(std::memcmp(out.data(), expected.bytes.data(), expected.bytes.size()), 0);
  }
  EXPECT_EQ(seen.size(), 10u);
}

TEST(GgufBlocks, PlainFloatsWiden) {
  const float values[3] = {1.5f, -0.0f, 3.0e38f};
  float out[3] = {};
  decode_ggml(GgmlType::kF32, reinterpret_cast<const std::uint8_t*>(values), 3, out);
  EXPECT_EQ(std::memcmp(values, out, sizeof out), 0);
  const std::uint16_t halves[2] = {0x3C00, 0xC000};
  decode_ggml(GgmlType::kF16, reinterpret_cast<const std::uint8_t*>(halves), 2, out);
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -2.0f);
  const std::uint16_t brains[2] = {0x3F80, 0xC000};
  decode_ggml(GgmlType::kBF16, reinterpret_cast<const std::uint8_t*>(brains), 2, out);
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -2.0f);
}

TEST(GgufBlocks, UnalignedDataDecodes) {
  alignas(16) std::uint8_t bytes[1 + 2 * 4] = {};
  const float values[2] = {1.25f, -7.0f};
  std::memcpy(bytes + 1, values, sizeof values);
  float out[2] = {};
  decode_ggml(GgmlType::kF32, bytes + 1, 2, out);
  EXPECT_EQ(out[0], 1.25f);
  const std::uint16_t halves[2] = {0x3C00, 0xC000};
  std::memcpy(bytes + 1, halves, sizeof halves);
  decode_ggml(GgmlType::kF16, bytes + 1, 2, out);
  EXPECT_EQ(out[1], -2.0f);
}

TEST(GgufBlocks, RefusesWhatItCannotDecode) {
  std::uint8_t bytes[512] = {};
  float out[256] = {};
  const auto code_of = [&](std::uint32_t type, std::int64_t n) {
    try {
      decode_ggml(static_cast<GgmlType>(type), bytes, n, out);
    } catch (const Error& e) {
      return e.code();
    }
    return Errc::kInternal;
  };
  EXPECT_EQ(code_of(9, 32), Errc::kUnsupported);     // Q8_1: known size, no decoder
  EXPECT_EQ(code_of(24, 32), Errc::kUnsupported);    // I8
  EXPECT_EQ(code_of(4711, 32), Errc::kUnsupported);  // not a type
  EXPECT_EQ(code_of(3, 31), Errc::kShape);
  EXPECT_EQ(code_of(12, 128), Errc::kShape);
  EXPECT_EQ(code_of(3, -32), Errc::kShape);
  EXPECT_EQ(find_ggml_block(4), nullptr);  // a number that ggml retired
}

}  // namespace
}  // namespace quantal

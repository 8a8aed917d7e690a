// The table of ggml types and the decoder that reads it.
#include <algorithm>
#include <array>
#include <cstring>

#include "core/half.h"
#include "formats/gguf/blocks.h"
#include "quantal/ggml.h"

namespace quantal {
namespace {

using formats::gguf::decode_block;

constexpr std::array<GgmlBlock, 21> kBlocks = {{
    {GgmlType::kF32, "F32", 1, 4, true},
    {GgmlType::kF16, "F16", 1, 2, true},
    {GgmlType::kQ4_0, "Q4_0", 32, 18, true},
    {GgmlType::kQ4_1, "Q4_1", 32, 20, true},
    {GgmlType::kQ5_0, "Q5_0", 32, 22, true},
    {GgmlType::kQ5_1, "Q5_1", 32, 24, true},
    {GgmlType::kQ8_0, "Q8_0", 32, 34, true},
    {static_cast<GgmlType>(9), "Q8_1", 32, 36, false},
    {GgmlType::kQ2_K, "Q2_K", 256, 84, true},
    {GgmlType::kQ3_K, "Q3_K", 256, 110, true},
    {GgmlType::kQ4_K, "Q4_K", 256, 144, true},
    {GgmlType::kQ5_K, "Q5_K", 256, 176, true},
    {GgmlType::kQ6_K, "Q6_K", 256, 210, true},
    {static_cast<GgmlType>(15), "Q8_K", 256, 292, false},
    {GgmlType::kIQ4_NL, "IQ4_NL", 32, 18, true},
    {GgmlType::kI8, "I8", 1, 1, false},
    {GgmlType::kI16, "I16", 1, 2, false},
    {GgmlType::kI32, "I32", 1, 4, false},
    {GgmlType::kI64, "I64", 1, 8, false},
    {GgmlType::kF64, "F64", 1, 8, false},
    {GgmlType::kBF16, "BF16", 1, 2, true},
}};

/// Plain floats. Tensors of a file may lie at any address, widen_to_f32 wants whole elements.
void widen(DType dtype, const std::uint8_t* data, std::int64_t n, float* out) {
  constexpr std::int64_t kChunk = 1024;
  const auto size = static_cast<std::int64_t>(dtype_size(dtype));
  alignas(16) std::uint8_t aligned[kChunk * 4];
  for (std::int64_t i = 0; i < n; i += kChunk) {
    const std::int64_t count = std::min(kChunk, n - i);
    std::memcpy(aligned, data + i * size, static_cast<std::size_t>(count * size));
    widen_to_f32(dtype, aligned, count, out + i);
  }
}

template <class Block>
void decode_blocks(const std::uint8_t* data, std::int64_t n, float* out) {
  constexpr std::int64_t kElements = sizeof(Block) < 40 ? 32 : 256;
  for (std::int64_t i = 0; i < n; i += kElements) {
    Block block;
    std::memcpy(&block, data, sizeof block);
    decode_block(block, out + i);
    data += sizeof block;
  }
}

}  // namespace

const GgmlBlock* find_ggml_block(std::uint32_t type) noexcept {
  for (const GgmlBlock& block : kBlocks) {
    if (static_cast<std::uint32_t>(block.type) == type) return &block;
  }
  return nullptr;
}

const GgmlBlock* find_ggml_block(std::string_view name) noexcept {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  for (const GgmlBlock& block : kBlocks) {
    if (std::equal(block.name.begin(), block.name.end(), name.begin(), name.end(),
                   [&](char a, char b) { return lower(a) == lower(b); })) {
      return &block;
    }
  }
  return nullptr;
}

const GgmlBlock& ggml_block(GgmlType type) {
  if (const GgmlBlock* block = find_ggml_block(static_cast<std::uint32_t>(type))) return *block;
  fail(Errc::kUnsupported, "gguf: tensor type is " +
                               std::to_string(static_cast<std::uint32_t>(type)) +
                               ", which is not a known ggml type");
}

std::int64_t ggml_bytes(GgmlType type, std::int64_t rows, std::int64_t cols) {
  const GgmlBlock& block = ggml_block(type);
  if (rows < 0 || cols < 0 || cols % block.elements != 0) {
    fail(Errc::kShape, "gguf: shape is " + shape_string(std::array{rows, cols}) +
                           ", expected rows of a multiple of " + std::to_string(block.elements) +
                           " weights (" + std::string(block.name) + ")");
  }
  return checked_mul(rows, checked_mul(cols / block.elements, block.bytes, "gguf: row bytes"),
                     "gguf: bytes");
}

GgmlType ggml_type_for(GgmlType wanted, std::int64_t cols) {
  if (cols % ggml_block(wanted).elements == 0) return wanted;
  if (cols % 32 != 0) return GgmlType::kF16;
  switch (wanted) {
    case GgmlType::kQ4_K:
      return GgmlType::kQ5_0;
    case GgmlType::kQ5_K:
      return GgmlType::kQ5_1;
    case GgmlType::kQ6_K:
      return GgmlType::kQ8_0;
    default:
      return GgmlType::kIQ4_NL;
  }
}

void decode_ggml(GgmlType type, const std::uint8_t* data, std::int64_t n, float* out) {
  using namespace formats::gguf;
  const GgmlBlock* block = find_ggml_block(static_cast<std::uint32_t>(type));
  if (block == nullptr || !block->decodable) {
    fail(Errc::kUnsupported,
         "gguf: tensor type is " +
             (block == nullptr ? std::to_string(static_cast<std::uint32_t>(type))
                               : std::string(block->name)) +
             ", expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K or IQ4_NL");
  }
  if (n < 0 || n % block->elements != 0) {
    fail(Errc::kShape, "gguf: number of elements is " + std::to_string(n) +
                           ", expected a multiple of " + std::to_string(block->elements) + " (" +
                           std::string(block->name) + ")");
  }
  switch (type) {
    case GgmlType::kF32:
      return widen(DType::kF32, data, n, out);
    case GgmlType::kF16:
      return widen(DType::kF16, data, n, out);
    case GgmlType::kBF16:
      return widen(DType::kBF16, data, n, out);
    case GgmlType::kQ4_0:
      return decode_blocks<Q4_0>(data, n, out);
    case GgmlType::kQ4_1:
      return decode_blocks<Q4_1>(data, n, out);
    case GgmlType::kQ5_0:
      return decode_blocks<Q5_0>(data, n, out);
    case GgmlType::kQ5_1:
      return decode_blocks<Q5_1>(data, n, out);
    case GgmlType::kQ8_0:
      return decode_blocks<Q8_0>(data, n, out);
    case GgmlType::kQ2_K:
      return decode_blocks<Q2_K>(data, n, out);
    case GgmlType::kQ3_K:
      return decode_blocks<Q3_K>(data, n, out);
    case GgmlType::kQ4_K:
      return decode_blocks<Q4_K>(data, n, out);
    case GgmlType::kQ5_K:
      return decode_blocks<Q5_K>(data, n, out);
    case GgmlType::kQ6_K:
      return decode_blocks<Q6_K>(data, n, out);
    case GgmlType::kIQ4_NL:
      return decode_blocks<IQ4_NL>(data, n, out);
    default:
      break;
  }
  fail(Errc::kInternal, "gguf: type is listed as decodable without a decoder");
}

}  // namespace quantal

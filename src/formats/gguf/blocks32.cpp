#include "core/half.h"
#include "formats/gguf/blocks.h"
#include "quantal/kernels.h"

namespace quantal::formats::gguf {
namespace {

constexpr int kHalf = 16;  // elements per nibble

float half_at(const std::uint8_t (&bytes)[2]) {
  return f16_to_f32(static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8));
}

std::uint32_t u32_at(const std::uint8_t (&bytes)[4]) {
  return static_cast<std::uint32_t>(bytes[0]) | static_cast<std::uint32_t>(bytes[1]) << 8 |
         static_cast<std::uint32_t>(bytes[2]) << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
}

}  // namespace

void decode_block(const Q4_0& block, float* out) noexcept {
  const float d = half_at(block.d);
  for (int j = 0; j < kHalf; ++j) {
    out[j] = d * static_cast<float>((block.qs[j] & 15) - 8);
    out[j + kHalf] = d * static_cast<float>((block.qs[j] >> 4) - 8);
  }
}

void decode_block(const Q4_1& block, float* out) noexcept {
  const float d = half_at(block.d);
  const float m = half_at(block.m);
  for (int j = 0; j < kHalf; ++j) {
    out[j] = d * static_cast<float>(block.qs[j] & 15) + m;
    out[j + kHalf] = d * static_cast<float>(block.qs[j] >> 4) + m;
  }
}

void decode_block(const Q5_0& block, float* out) noexcept {
  const float d = half_at(block.d);
  const std::uint32_t high = u32_at(block.qh);
  for (int j = 0; j < kHalf; ++j) {
    const int low_bit = static_cast<int>((high >> j) & 1u) << 4;
    const int high_bit = static_cast<int>((high >> (j + kHalf)) & 1u) << 4;
    out[j] = d * static_cast<float>(((block.qs[j] & 15) | low_bit) - 16);
    out[j + kHalf] = d * static_cast<float>(((block.qs[j] >> 4) | high_bit) - 16);
  }
}

void decode_block(const Q5_1& block, float* out) noexcept {
  const float d = half_at(block.d);
  const float m = half_at(block.m);
  const std::uint32_t high = u32_at(block.qh);
  for (int j = 0; j < kHalf; ++j) {
    const int low_bit = static_cast<int>((high >> j) & 1u) << 4;
    const int high_bit = static_cast<int>((high >> (j + kHalf)) & 1u) << 4;
    out[j] = d * static_cast<float>((block.qs[j] & 15) | low_bit) + m;
    out[j + kHalf] = d * static_cast<float>((block.qs[j] >> 4) | high_bit) + m;
  }
}

void decode_block(const Q8_0& block, float* out) noexcept {
  const float d = half_at(block.d);
  for (int j = 0; j < 2 * kHalf; ++j) {
    out[j] = d * static_cast<float>(static_cast<std::int8_t>(block.qs[j]));
  }
}

void decode_block(const IQ4_NL& block, float* out) noexcept {
  const float d = half_at(block.d);
  for (int j = 0; j < kHalf; ++j) {
    out[j] = d * kIq4NlCodebook[block.qs[j] & 15];
    out[j + kHalf] = d * kIq4NlCodebook[block.qs[j] >> 4];
  }
}

}  // namespace quantal::formats::gguf

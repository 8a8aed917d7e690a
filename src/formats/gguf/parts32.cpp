// Blocks of 32 taken apart and put together.
#include <cstring>

#include "formats/gguf/blocks.h"

namespace quantal::formats::gguf {
namespace {

constexpr int kHalf = 16;

std::uint16_t u16_at(const std::uint8_t (&bytes)[2]) {
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

void set_u16(std::uint16_t value, std::uint8_t (&bytes)[2]) {
  bytes[0] = static_cast<std::uint8_t>(value);
  bytes[1] = static_cast<std::uint8_t>(value >> 8);
}

void split_nibbles(const std::uint8_t (&qs)[16], std::uint8_t* codes) {
  for (int j = 0; j < kHalf; ++j) {
    codes[j] = qs[j] & 15;
    codes[j + kHalf] = qs[j] >> 4;
  }
}

void join_nibbles(const std::uint8_t* codes, std::uint8_t (&qs)[16]) {
  for (int j = 0; j < kHalf; ++j) {
    qs[j] = static_cast<std::uint8_t>((codes[j] & 15) | codes[j + kHalf] << 4);
  }
}

void add_fifth_bits(const std::uint8_t (&qh)[4], std::uint8_t* codes) {
  for (int i = 0; i < 2 * kHalf; ++i) {
    codes[i] = static_cast<std::uint8_t>(codes[i] | ((qh[i / 8] >> (i % 8)) & 1) << 4);
  }
}

void take_fifth_bits(const std::uint8_t* codes, std::uint8_t (&qh)[4]) {
  for (int byte = 0; byte < 4; ++byte) {
    int bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (codes[8 * byte + i] >> 4 & 1) << i;
    qh[byte] = static_cast<std::uint8_t>(bits);
  }
}

}  // namespace

void take_apart(const Q4_0& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  split_nibbles(block.qs, parts.codes);
}

void take_apart(const Q4_1& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  parts.offset = u16_at(block.m);
  split_nibbles(block.qs, parts.codes);
}

void take_apart(const Q5_0& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  split_nibbles(block.qs, parts.codes);
  add_fifth_bits(block.qh, parts.codes);
}

void take_apart(const Q5_1& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  parts.offset = u16_at(block.m);
  split_nibbles(block.qs, parts.codes);
  add_fifth_bits(block.qh, parts.codes);
}

/// The packed form holds unsigned codes: q + 128 is q with its top bit turned.
void take_apart(const Q8_0& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  for (int i = 0; i < 2 * kHalf; ++i) parts.codes[i] = block.qs[i] ^ 0x80;
}

void take_apart(const IQ4_NL& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  split_nibbles(block.qs, parts.codes);
}

bool put_together(const Parts& parts, Q4_0& block) noexcept {
  set_u16(parts.scale, block.d);
  join_nibbles(parts.codes, block.qs);
  return true;
}

bool put_together(const Parts& parts, Q4_1& block) noexcept {
  set_u16(parts.scale, block.d);
  set_u16(parts.offset, block.m);
  join_nibbles(parts.codes, block.qs);
  return true;
}

bool put_together(const Parts& parts, Q5_0& block) noexcept {
  set_u16(parts.scale, block.d);
  join_nibbles(parts.codes, block.qs);
  take_fifth_bits(parts.codes, block.qh);
  return true;
}

bool put_together(const Parts& parts, Q5_1& block) noexcept {
  set_u16(parts.scale, block.d);
  set_u16(parts.offset, block.m);
  join_nibbles(parts.codes, block.qs);
  take_fifth_bits(parts.codes, block.qh);
  return true;
}

bool put_together(const Parts& parts, Q8_0& block) noexcept {
  set_u16(parts.scale, block.d);
  for (int i = 0; i < 2 * kHalf; ++i) block.qs[i] = parts.codes[i] ^ 0x80;
  return true;
}

bool put_together(const Parts& parts, IQ4_NL& block) noexcept {
  set_u16(parts.scale, block.d);
  join_nibbles(parts.codes, block.qs);
  return true;
}

}  // namespace quantal::formats::gguf

// Super-blocks of 256 taken apart and put together. Where each bit stands: docs/formats/gguf.md.
#include <cstring>

#include "formats/gguf/blocks.h"

namespace quantal::formats::gguf {
namespace {

constexpr int kElements = 256;

std::uint16_t u16_at(const std::uint8_t (&bytes)[2]) {
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

void set_u16(std::uint16_t value, std::uint8_t (&bytes)[2]) {
  bytes[0] = static_cast<std::uint8_t>(value);
  bytes[1] = static_cast<std::uint8_t>(value >> 8);
}

std::uint8_t byte_of(int value) { return static_cast<std::uint8_t>(value); }

// Loops run over runs of 32 bytes with one shift each, which compilers turn into vectors.

/// Fields of `kBits` bits: run r of 32 elements stands in bytes 32 * (r / per) .. of `from`, `per`
/// runs to a byte.
template <int kBits, int kRunBytes>
void split_fields(const std::uint8_t* from, std::uint8_t* codes) {
  constexpr int kPer = 8 / kBits, kMask = (1 << kBits) - 1;
  for (int run = 0; run < kElements / kRunBytes; ++run) {
    const std::uint8_t* bytes = from + kRunBytes * (run / kPer);
    const int shift = kBits * (run % kPer);
    for (int i = 0; i < kRunBytes; ++i) {
      codes[kRunBytes * run + i] = byte_of(bytes[i] >> shift & kMask);
    }
  }
}

/// Inverse: the low `kBits` of codes >> from_bit.
template <int kBits, int kRunBytes>
void join_fields(const std::uint8_t* codes, int from_bit, std::uint8_t* to) {
  constexpr int kPer = 8 / kBits, kMask = (1 << kBits) - 1;
  for (int block = 0; block < kElements / kRunBytes / kPer; ++block) {
    std::uint8_t* bytes = to + kRunBytes * block;
    std::memset(bytes, 0, kRunBytes);
    for (int part = 0; part < kPer; ++part) {
      const std::uint8_t* run = codes + kRunBytes * (kPer * block + part);
      for (int i = 0; i < kRunBytes; ++i) {
        bytes[i] = byte_of(bytes[i] | (run[i] >> from_bit & kMask) << (kBits * part));
      }
    }
  }
}

/// Adds bit `to_bit` of every element; run r of 32 is bit r of the 32 bytes `from`.
void add_bits(const std::uint8_t (&from)[32], int to_bit, std::uint8_t* codes) {
  for (int run = 0; run < 8; ++run) {
    for (int i = 0; i < 32; ++i) {
      codes[32 * run + i] = byte_of(codes[32 * run + i] | (from[i] >> run & 1) << to_bit);
    }
  }
}

/// The eight 6-bit pairs of Q4_K and Q5_K. Pairs 0..3 stand in the low six bits of bytes j and
/// j + 4; pairs 4..7 take four bits from byte j + 4 and two from the top of bytes j - 4 and j.
void split_pairs(const std::uint8_t (&t)[12], Parts& parts) {
  for (int j = 0; j < 4; ++j) {
    parts.scales[j] = t[j] & 63;
    parts.offsets[j] = t[j + 4] & 63;
    parts.scales[j + 4] = byte_of((t[j + 8] & 15) | (t[j] >> 6) << 4);
    parts.offsets[j + 4] = byte_of((t[j + 8] >> 4) | (t[j + 4] >> 6) << 4);
  }
}

bool join_pairs(const Parts& parts, std::uint8_t (&t)[12]) {
  int all = 0;
  for (int j = 0; j < 4; ++j) {
    const int s = parts.scales[j + 4], m = parts.offsets[j + 4];
    t[j] = byte_of(parts.scales[j] | (s >> 4) << 6);
    t[j + 4] = byte_of(parts.offsets[j] | (m >> 4) << 6);
    t[j + 8] = byte_of((s & 15) | (m & 15) << 4);
    all |= s | m | parts.scales[j] | parts.offsets[j];
  }
  return all < 64;
}

}  // namespace

void take_apart(const Q2_K& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  parts.offset = u16_at(block.dmin);
  std::memcpy(parts.scales, block.scales, sizeof(block.scales));
  split_fields<2, 32>(block.qs, parts.codes);
}

bool put_together(const Parts& parts, Q2_K& block) noexcept {
  set_u16(parts.scale, block.d);
  set_u16(parts.offset, block.dmin);
  std::memcpy(block.scales, parts.scales, sizeof(block.scales));
  join_fields<2, 32>(parts.codes, 0, block.qs);
  return true;
}

/// Scale j has its low four bits in a nibble of the first eight bytes and its top two in the other
/// four; the packed form holds it as a signed byte with the centre of 32 taken off.
void take_apart(const Q3_K& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  for (int j = 0; j < 16; ++j) {
    const int low = block.scales[j % 8] >> (j < 8 ? 0 : 4) & 15;
    const int high = block.scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    parts.scales[j] = byte_of((low | high << 4) - 32);
  }
  split_fields<2, 32>(block.qs, parts.codes);
  add_bits(block.hmask, 2, parts.codes);
}

bool put_together(const Parts& parts, Q3_K& block) noexcept {
  set_u16(parts.scale, block.d);
  std::memset(block.scales, 0, sizeof(block.scales));
  bool fits = true;
  for (int j = 0; j < 16; ++j) {
    const int scale = static_cast<std::int8_t>(parts.scales[j]) + 32;
    fits = fits && scale >= 0 && scale < 64;
    std::uint8_t& low = block.scales[j % 8];
    std::uint8_t& high = block.scales[8 + j % 4];
    low = byte_of(low | (scale & 15) << (j < 8 ? 0 : 4));
    high = byte_of(high | (scale >> 4 & 3) << (2 * (j / 4)));
  }
  join_fields<2, 32>(parts.codes, 0, block.qs);
  join_fields<1, 32>(parts.codes, 2, block.hmask);
  return fits;
}

void take_apart(const Q4_K& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  parts.offset = u16_at(block.dmin);
  split_pairs(block.scales, parts);
  split_fields<4, 32>(block.qs, parts.codes);
}

bool put_together(const Parts& parts, Q4_K& block) noexcept {
  set_u16(parts.scale, block.d);
  set_u16(parts.offset, block.dmin);
  join_fields<4, 32>(parts.codes, 0, block.qs);
  return join_pairs(parts, block.scales);
}

void take_apart(const Q5_K& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  parts.offset = u16_at(block.dmin);
  split_pairs(block.scales, parts);
  split_fields<4, 32>(block.qs, parts.codes);
  add_bits(block.qh, 4, parts.codes);
}

bool put_together(const Parts& parts, Q5_K& block) noexcept {
  set_u16(parts.scale, block.d);
  set_u16(parts.offset, block.dmin);
  join_fields<4, 32>(parts.codes, 0, block.qs);
  join_fields<1, 32>(parts.codes, 4, block.qh);
  return join_pairs(parts, block.scales);
}

void take_apart(const Q6_K& block, Parts& parts) noexcept {
  parts.scale = u16_at(block.d);
  std::memcpy(parts.scales, block.scales, sizeof(block.scales));
  std::uint8_t high[kElements];
  split_fields<4, 64>(block.ql, parts.codes);
  split_fields<2, 32>(block.qh, high);
  for (int i = 0; i < kElements; ++i) parts.codes[i] = byte_of(parts.codes[i] | high[i] << 4);
}

bool put_together(const Parts& parts, Q6_K& block) noexcept {
  set_u16(parts.scale, block.d);
  std::memcpy(block.scales, parts.scales, sizeof(block.scales));
  join_fields<4, 64>(parts.codes, 0, block.ql);
  join_fields<2, 32>(parts.codes, 4, block.qh);
  return true;
}

}  // namespace quantal::formats::gguf

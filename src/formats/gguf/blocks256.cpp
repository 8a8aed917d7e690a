#include "core/half.h"
#include "formats/gguf/blocks.h"

namespace quantal::formats::gguf {
namespace {

constexpr int kElements = 256;

float half_at(const std::uint8_t (&bytes)[2]) {
  return f16_to_f32(static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8));
}

/// Two-bit field of element i in the qs of Q2_K and Q3_K.
int two_bits(const std::uint8_t (&qs)[64], int i) {
  return (qs[32 * (i / 128) + i % 32] >> (2 * ((i % 128) / 32))) & 3;
}

/// Nibble of element i in the qs of Q4_K and Q5_K.
int nibble(const std::uint8_t (&qs)[128], int i) {
  return (qs[32 * (i / 64) + i % 32] >> (4 * ((i % 64) / 32))) & 15;
}

struct ScaleMin {
  int scale, min;
};

/// The 6-bit pair j (0..7) of Q4_K and Q5_K. Pairs 0..3 stand in the low six bits of bytes j and
/// j + 4; pairs 4..7 take four bits from byte j + 4 and two from the top of bytes j - 4 and j.
ScaleMin scale_min(const std::uint8_t (&t)[12], int j) {
  if (j < 4) return {t[j] & 63, t[j + 4] & 63};
  return {(t[j + 4] & 15) | (t[j - 4] >> 6) << 4, (t[j + 4] >> 4) | (t[j] >> 6) << 4};
}

/// The 6-bit scale j (0..15) of Q3_K before its centre of 32 is taken off.
int scale_q3(const std::uint8_t (&scales)[12], int j) {
  const int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4;
  return low | ((scales[8 + j % 4] >> (2 * (j / 4))) & 3) << 4;
}

}  // namespace

void decode_block(const Q2_K& block, float* out) noexcept {
  const float d = half_at(block.d);
  const float dmin = half_at(block.dmin);
  for (int run = 0; run < kElements; run += 16) {
    const int s = block.scales[run / 16];
    const float scale = d * static_cast<float>(s & 15);
    const float min = dmin * static_cast<float>(s >> 4);
    for (int i = run; i < run + 16; ++i) {
      out[i] = scale * static_cast<float>(two_bits(block.qs, i)) - min;
    }
  }
}

void decode_block(const Q3_K& block, float* out) noexcept {
  const float d = half_at(block.d);
  for (int run = 0; run < kElements; run += 16) {
    const float scale = d * static_cast<float>(scale_q3(block.scales, run / 16) - 32);
    for (int i = run; i < run + 16; ++i) {
      const int high = (block.hmask[i % 32] >> (i / 32)) & 1;
      out[i] = scale * static_cast<float>(two_bits(block.qs, i) - (high != 0 ? 0 : 4));
    }
  }
}

void decode_block(const Q4_K& block, float* out) noexcept {
  const float d = half_at(block.d);
  const float dmin = half_at(block.dmin);
  for (int run = 0; run < kElements; run += 32) {
    const ScaleMin pair = scale_min(block.scales, run / 32);
    const float scale = d * static_cast<float>(pair.scale);
    const float min = dmin * static_cast<float>(pair.min);
    for (int i = run; i < run + 32; ++i) {
      out[i] = scale * static_cast<float>(nibble(block.qs, i)) - min;
    }
  }
}

void decode_block(const Q5_K& block, float* out) noexcept {
  const float d = half_at(block.d);
  const float dmin = half_at(block.dmin);
  for (int run = 0; run < kElements; run += 32) {
    const ScaleMin pair = scale_min(block.scales, run / 32);
    const float scale = d * static_cast<float>(pair.scale);
    const float min = dmin * static_cast<float>(pair.min);
    for (int i = run; i < run + 32; ++i) {
      const int high = ((block.qh[i % 32] >> (i / 32)) & 1) << 4;
      out[i] = scale * static_cast<float>(nibble(block.qs, i) | high) - min;
    }
  }
}

void decode_block(const Q6_K& block, float* out) noexcept {
  const float d = half_at(block.d);
  for (int run = 0; run < kElements; run += 16) {
    const float scale = d * static_cast<float>(static_cast<std::int8_t>(block.scales[run / 16]));
    for (int i = run; i < run + 16; ++i) {
      const int r = i % 128;
      const int n = i / 128;
      const int low = (block.ql[64 * n + r % 64] >> (4 * (r / 64))) & 15;
      const int high = (block.qh[32 * n + r % 32] >> (2 * (r / 32))) & 3;
      out[i] = scale * static_cast<float>((low | high << 4) - 32);
    }
  }
}

}  // namespace quantal::formats::gguf

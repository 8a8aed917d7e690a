// What the files of kernels that quantize share: the place of a thread, numbers as bytes, strips of
// codes. No kernel, so that several sources may include it.
#pragma once

#include "kernels/cuda/decode_inl.h"
#include "kernels/cuda/encode_inl.h"
#include "kernels/cuda/geometry.h"

namespace quantal::cuda {

inline constexpr int kQuantizeThreads = 256;

inline Geometry quantize_geometry(std::int64_t threads) {
  return {.blocks_x = (threads + kQuantizeThreads - 1) / kQuantizeThreads,
          .threads = kQuantizeThreads};
}

QUANTAL_DEVICE std::int64_t quantize_thread() {
  return block_x() * kQuantizeThreads + thread_index();
}

/// Whether v is finite as binary16.
QUANTAL_DEVICE bool is_half(float v) { return (f16_of(v) & 0x7FFFU) < 0x7C00U; }

QUANTAL_DEVICE void store_word(std::uint8_t* to, std::uint32_t word) {
  for (int i = 0; i < 4; ++i) to[i] = static_cast<std::uint8_t>(word >> (8 * i));
}

QUANTAL_DEVICE void store_half(std::uint8_t* to, std::uint16_t half) {
  to[0] = static_cast<std::uint8_t>(half);
  to[1] = static_cast<std::uint8_t>(half >> 8);
}

/// One strip, 16 bytes of one plane, made from the codes of all chunks that have a part.
template <int kBits, class Chunk>
QUANTAL_DEVICE Words4 make_strip(std::int64_t strip, Chunk chunk) {
  using W = Planes<kBits>;
  constexpr int kStrips = W::kUnitBytes / 16, kLowStrips = W::kLowBytes / 16;
  // No calls within the shifts below: of (w[k] >> n & call()) << m with a const w, GCC 11 and 12
  // under -fsanitize=bounds,shift set the k that is read only where m is out of range.
  constexpr std::uint32_t kLowMask = byte_mask(W::kLow), kHighMask = byte_mask(W::kHigh);
  const std::int64_t unit = strip / kStrips;
  const auto inside = static_cast<int>(strip % kStrips);
  const bool low = inside < kLowStrips;
  const int chunks = low ? W::kFields : W::kUnitChunks;
  const std::int64_t first = unit * W::kUnitChunks + (low ? inside * W::kFields : 0);
  Words4 out = {{0, 0, 0, 0}};
  for (int c = 0; c < chunks; ++c) {
    const Codes16 codes = chunk(first + c);
    QUANTAL_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (low) {
        out.w[k] |= (codes.w[k] & kLowMask) << (W::kLow * c);
      } else {
        out.w[k] |= (codes.w[k] >> W::kLow & kHighMask) << (W::kHigh * c);
      }
    }
  }
  return out;
}

}  // namespace quantal::cuda

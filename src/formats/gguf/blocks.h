// The blocks of GGUF tensors. Reference: ggml 0.21.0 C decoders compiled without fused
// multiply-add; every product, sum and float16 widening is rounded on its own, so the bits match.
#pragma once

#include <cstdint>

namespace quantal::formats::gguf {

// Blocks of 32 elements. Byte j of `qs` holds element j in its low nibble and element j + 16 in its
// high one; bit j of the little-endian u32 `qh` is bit 4 of element j. d and m are binary16.

struct Q4_0 {  ///< w = d * (q - 8)
  std::uint8_t d[2], qs[16];
};
struct Q4_1 {  ///< w = d * q + m
  std::uint8_t d[2], m[2], qs[16];
};
struct Q5_0 {  ///< w = d * (q - 16)
  std::uint8_t d[2], qh[4], qs[16];
};
struct Q5_1 {  ///< w = d * q + m
  std::uint8_t d[2], m[2], qh[4], qs[16];
};
struct Q8_0 {  ///< w = d * q, q signed
  std::uint8_t d[2], qs[32];
};
struct IQ4_NL {  ///< w = d * kIq4NlCodebook[q]
  std::uint8_t d[2], qs[16];
};

// Super-blocks of 256 elements; i is the element.

struct Q2_K {  ///< w = (d * (s & 15)) * q - dmin * (s >> 4), s = scales[i / 16]
  std::uint8_t scales[16], qs[64], d[2], dmin[2];
};
struct Q3_K {  ///< w = (d * (s - 32)) * q, s of 6 bits spread over `scales`
  std::uint8_t hmask[32], qs[64], scales[12], d[2];
};
struct Q4_K {  ///< w = (d * s) * q - dmin * m, s and m of 6 bits per 32 elements
  std::uint8_t d[2], dmin[2], scales[12], qs[128];
};
struct Q5_K {  ///< as Q4_K with bit 4 of q in qh
  std::uint8_t d[2], dmin[2], scales[12], qh[32], qs[128];
};
struct Q6_K {  ///< w = (d * scales[i / 16]) * (q - 32), scales signed
  std::uint8_t ql[128], qh[64], scales[16], d[2];
};

static_assert(sizeof(Q4_0) == 18 && sizeof(Q4_1) == 20 && sizeof(Q5_0) == 22);
static_assert(sizeof(Q5_1) == 24 && sizeof(Q8_0) == 34 && sizeof(IQ4_NL) == 18);
static_assert(sizeof(Q2_K) == 84 && sizeof(Q3_K) == 110 && sizeof(Q4_K) == 144);
static_assert(sizeof(Q5_K) == 176 && sizeof(Q6_K) == 210);

/// Decode one block each; `out` has room for 32 or 256 floats.
void decode_block(const Q4_0& block, float* out) noexcept;
void decode_block(const Q4_1& block, float* out) noexcept;
void decode_block(const Q5_0& block, float* out) noexcept;
void decode_block(const Q5_1& block, float* out) noexcept;
void decode_block(const Q8_0& block, float* out) noexcept;
void decode_block(const IQ4_NL& block, float* out) noexcept;
void decode_block(const Q2_K& block, float* out) noexcept;
void decode_block(const Q3_K& block, float* out) noexcept;
void decode_block(const Q4_K& block, float* out) noexcept;
void decode_block(const Q5_K& block, float* out) noexcept;
void decode_block(const Q6_K& block, float* out) noexcept;

/// A block taken apart: codes one per byte, statistics as the packed form keeps them
/// (quantal/kernels.h). What a type does not have stays as it was.
struct Parts {
  std::uint8_t codes[256];
  std::uint8_t scales[16], offsets[16];  ///< sub-scales and sub-offsets of super-blocks
  std::uint16_t scale, offset;           ///< d and m or dmin, binary16
};
void take_apart(const Q4_0& block, Parts& parts) noexcept;
void take_apart(const Q4_1& block, Parts& parts) noexcept;
void take_apart(const Q5_0& block, Parts& parts) noexcept;
void take_apart(const Q5_1& block, Parts& parts) noexcept;
void take_apart(const Q8_0& block, Parts& parts) noexcept;
void take_apart(const IQ4_NL& block, Parts& parts) noexcept;
void take_apart(const Q2_K& block, Parts& parts) noexcept;
void take_apart(const Q3_K& block, Parts& parts) noexcept;
void take_apart(const Q4_K& block, Parts& parts) noexcept;
void take_apart(const Q5_K& block, Parts& parts) noexcept;
void take_apart(const Q6_K& block, Parts& parts) noexcept;

/// Inverse of take_apart. False if a sub-scale has no place in the block (6 bits); codes are within
/// their width.
bool put_together(const Parts& parts, Q4_0& block) noexcept;
bool put_together(const Parts& parts, Q4_1& block) noexcept;
bool put_together(const Parts& parts, Q5_0& block) noexcept;
bool put_together(const Parts& parts, Q5_1& block) noexcept;
bool put_together(const Parts& parts, Q8_0& block) noexcept;
bool put_together(const Parts& parts, IQ4_NL& block) noexcept;
bool put_together(const Parts& parts, Q2_K& block) noexcept;
bool put_together(const Parts& parts, Q3_K& block) noexcept;
bool put_together(const Parts& parts, Q4_K& block) noexcept;
bool put_together(const Parts& parts, Q5_K& block) noexcept;
bool put_together(const Parts& parts, Q6_K& block) noexcept;

}  // namespace quantal::formats::gguf

// MLX: codes of a row as one little-endian string of bits.
#pragma once

#include <cstdint>

namespace quantal::mlx {

/// Writes n codes of `bits` bits: code i is bits [i * bits, (i + 1) * bits) of the string, bit 0
/// the lowest of the first byte. n is a multiple of 8, so `out` has n / 8 * bits bytes; codes are
/// one per byte, each < 2^bits.
void pack_bits(int bits, const std::uint8_t* codes, std::int64_t n, std::uint8_t* out);
/// Inverse of pack_bits.
void unpack_bits(int bits, const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes);

}  // namespace quantal::mlx

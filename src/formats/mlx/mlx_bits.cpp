// Eight codes are gathered or spread in one 64-bit word, in three steps that double the distance:
//
//   codes of b bits every 8 bits -> 2b bits every 16 -> 4b bits every 32 -> 8b bits in a row
#include "formats/mlx/mlx_bits.h"

#include <bit>
#include <cstring>

namespace quantal::mlx {
namespace {

static_assert(std::endian::native == std::endian::little, "words are stored as they are");

constexpr std::uint64_t low_bits(int n) { return (std::uint64_t{1} << n) - 1; }
/// The low n bits of every field of `field` bits.
constexpr std::uint64_t fields(int n, int field) {
  std::uint64_t out = 0;
  for (int at = 0; at < 64; at += field) out |= low_bits(n) << at;
  return out;
}

template <int kBits>
void pack(const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n; i += 8, out += kBits) {
    std::uint64_t x = 0;
    std::memcpy(&x, codes + i, 8);
    x = (x & fields(8, 16)) | ((x >> (8 - kBits)) & (fields(8, 16) << kBits));
    x = (x & fields(16, 32)) | ((x >> (16 - 2 * kBits)) & (fields(16, 32) << (2 * kBits)));
    x = (x & low_bits(32)) | ((x >> 32) << (4 * kBits));
    std::memcpy(out, &x, kBits);
  }
}

template <int kBits>
void unpack(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; i += 8, packed += kBits) {
    std::uint64_t x = 0;
    std::memcpy(&x, packed, kBits);
    x = (x & low_bits(4 * kBits)) | ((x >> (4 * kBits)) << 32);
    x = (x & fields(2 * kBits, 32)) | ((x << (16 - 2 * kBits)) & (fields(2 * kBits, 32) << 16));
    x = (x & fields(kBits, 16)) | ((x << (8 - kBits)) & (fields(kBits, 16) << 8));
    std::memcpy(codes + i, &x, 8);
  }
}

}  // namespace

void pack_bits(int bits, const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  switch (bits) {
    case 1:
      return pack<1>(codes, n, out);
    case 2:
      return pack<2>(codes, n, out);
    case 3:
      return pack<3>(codes, n, out);
    case 4:
      return pack<4>(codes, n, out);
    case 5:
      return pack<5>(codes, n, out);
    case 6:
      return pack<6>(codes, n, out);
    default:
      std::memcpy(out, codes, static_cast<std::size_t>(n));
  }
}

void unpack_bits(int bits, const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  switch (bits) {
    case 1:
      return unpack<1>(packed, n, codes);
    case 2:
      return unpack<2>(packed, n, codes);
    case 3:
      return unpack<3>(packed, n, codes);
    case 4:
      return unpack<4>(packed, n, codes);
    case 5:
      return unpack<5>(packed, n, codes);
    case 6:
      return unpack<6>(packed, n, codes);
    default:
      std::memcpy(codes, packed, static_cast<std::size_t>(n));
  }
}

}  // namespace quantal::mlx

// The order of codes in a row (quantal/kernels.h, PackedLayout): planes, strips and units.
#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::int64_t kStripBytes = 16;

/// A width as its planes, low bits first; high is 0 where there is one plane.
struct Planes {
  int low = 0, high = 0;
};

constexpr Planes planes_of(int bits) {
  switch (bits) {
    case 3:
      return {2, 1};
    case 5:
      return {4, 1};
    case 6:
      return {4, 2};
    default:
      return {bits, 0};
  }
}

/// Codes of a unit: one strip of its highest plane.
constexpr std::int64_t codes_of_unit(Planes p) {
  return kStripBytes * 8 / (p.high != 0 ? p.high : p.low);
}

/// Calls fn with the width as a compile-time constant.
template <class Fn>
void with_bits(int bits, const char* where, Fn fn) {
  switch (bits) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    case 5:
      return fn(std::integral_constant<int, 5>{});
    case 6:
      return fn(std::integral_constant<int, 6>{});
    case 8:
      return fn(std::integral_constant<int, 8>{});
    default:
      fail(Errc::kConfig, std::string(where) + ": bits is " + std::to_string(bits) +
                              ", expected 1, 2, 3, 4, 5, 6 or 8");
  }
}

/// 16 bytes as two words; every byte of a word is one lane.
struct Lanes {
  std::uint64_t a, b;
};
Lanes load(const std::uint8_t* p) {
  Lanes r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
void store(std::uint8_t* p, Lanes r) { std::memcpy(p, &r, sizeof(r)); }

/// `bits` low bits of every byte.
constexpr std::uint64_t byte_mask(int bits) {
  return 0x0101010101010101ULL * ((1U << static_cast<unsigned>(bits)) - 1U);
}

/// Packs bits [kShift, kShift + kBits) of `kCodes` codes into one plane.
template <int kBits, int kShift, std::int64_t kCodes>
void pack_plane(const std::uint8_t* codes, std::uint8_t* out) {
  constexpr std::uint64_t kMask = byte_mask(kBits);
  constexpr int kFields = 8 / kBits;
  for (std::int64_t strip = 0; strip < kCodes / (kStripBytes * kFields); ++strip) {
    Lanes packed{0, 0};
    for (int f = 0; f < kFields; ++f, codes += kStripBytes) {
      const Lanes in = load(codes);
      packed.a |= ((in.a >> kShift) & kMask) << (kBits * f);
      packed.b |= ((in.b >> kShift) & kMask) << (kBits * f);
    }
    store(out + strip * kStripBytes, packed);
  }
}

/// ORs a plane into bits [kShift, kShift + kBits) of `kCodes` codes (overwrites if kShift is 0).
template <int kBits, int kShift, std::int64_t kCodes>
void unpack_plane(const std::uint8_t* packed, std::uint8_t* codes) {
  constexpr std::uint64_t kMask = byte_mask(kBits);
  constexpr int kFields = 8 / kBits;
  for (std::int64_t strip = 0; strip < kCodes / (kStripBytes * kFields); ++strip) {
    const Lanes in = load(packed + strip * kStripBytes);
    for (int f = 0; f < kFields; ++f, codes += kStripBytes) {
      const Lanes old = kShift == 0 ? Lanes{0, 0} : load(codes);
      store(codes, {old.a | ((in.a >> (kBits * f)) & kMask) << kShift,
                    old.b | ((in.b >> (kBits * f)) & kMask) << kShift});
    }
  }
}

template <int kBits>
struct Unit {
  static constexpr Planes kPlanes = planes_of(kBits);
  static constexpr std::int64_t kCodes = codes_of_unit(kPlanes);
  static constexpr std::int64_t kBytes = kCodes * kBits / 8;
  static constexpr std::int64_t kLowBytes = kCodes * kPlanes.low / 8;

  static void pack(const std::uint8_t* codes, std::uint8_t* out) {
    pack_plane<kPlanes.low, 0, kCodes>(codes, out);
    if constexpr (kPlanes.high != 0) {
      pack_plane<kPlanes.high, kPlanes.low, kCodes>(codes, out + kLowBytes);
    }
  }
  static void unpack(const std::uint8_t* packed, std::uint8_t* codes) {
    unpack_plane<kPlanes.low, 0, kCodes>(packed, codes);
    if constexpr (kPlanes.high != 0) {
      unpack_plane<kPlanes.high, kPlanes.low, kCodes>(packed + kLowBytes, codes);
    }
  }
};

}  // namespace

std::int64_t unit_codes(int bits) {
  std::int64_t codes = 0;
  with_bits(bits, "unit_codes", [&](auto width) { codes = Unit<width()>::kCodes; });
  return codes;
}

std::int64_t unit_bytes(int bits) {
  std::int64_t bytes = 0;
  with_bits(bits, "unit_bytes", [&](auto width) { bytes = Unit<width()>::kBytes; });
  return bytes;
}

void pack_row(int bits, const std::uint8_t* codes, std::int64_t cols, std::uint8_t* out) {
  with_bits(bits, "pack_row", [&](auto width) {
    using U = Unit<width()>;
    std::int64_t c = 0;
    for (; c + U::kCodes <= cols; c += U::kCodes, out += U::kBytes) U::pack(codes + c, out);
    if (c == cols) return;
    std::uint8_t tail[U::kCodes] = {};
    std::memcpy(tail, codes + c, static_cast<std::size_t>(cols - c));
    U::pack(tail, out);
  });
}

void unpack_row(int bits, const std::uint8_t* packed, std::int64_t cols, std::uint8_t* codes) {
  with_bits(bits, "unpack_row", [&](auto width) {
    using U = Unit<width()>;
    std::int64_t c = 0;
    for (; c + U::kCodes <= cols; c += U::kCodes, packed += U::kBytes) U::unpack(packed, codes + c);
    if (c == cols) return;
    std::uint8_t tail[U::kCodes];
    U::unpack(packed, tail);
    std::memcpy(codes + c, tail, static_cast<std::size_t>(cols - c));
  });
}

}  // namespace quantal

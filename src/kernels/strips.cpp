// The order of codes in a row (quantal/kernels.h, PackedLayout): planes, strips and units.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/planes.h"
#include "kernels/widths.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::int64_t kStripBytes = 16;
static_assert(kColumnUnit == Planes<1>::kUnitCodes);  // the largest unit; the others divide it

/// with_width of a checked width.
template <class Fn>
auto with_bits(int bits, const char* where, Fn fn) {
  if (!is_width(bits)) {
    fail(Errc::kConfig,
         std::string(where) + ": bits is " + std::to_string(bits) + ", expected " + kWidthNames);
  }
  return with_width(bits, fn);
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
struct Unit : Planes<kBits> {
  using Planes<kBits>::kLow, Planes<kBits>::kHigh, Planes<kBits>::kUnitCodes;
  using Planes<kBits>::kUnitBytes, Planes<kBits>::kLowBytes;

  static void pack(const std::uint8_t* codes, std::uint8_t* out) {
    pack_plane<kLow, 0, kUnitCodes>(codes, out);
    if constexpr (kHigh != 0) {
      pack_plane<kHigh, kLow, kUnitCodes>(codes, out + kLowBytes);
    }
  }
  static void unpack(const std::uint8_t* packed, std::uint8_t* codes) {
    unpack_plane<kLow, 0, kUnitCodes>(packed, codes);
    if constexpr (kHigh != 0) {
      unpack_plane<kHigh, kLow, kUnitCodes>(packed + kLowBytes, codes);
    }
  }
};

}  // namespace

std::int64_t unit_codes(int bits) {
  return with_bits(bits, "unit_codes", [](auto width) { return Planes<width()>::kUnitCodes; });
}

std::int64_t unit_bytes(int bits) {
  return with_bits(bits, "unit_bytes", [](auto width) { return Planes<width()>::kUnitBytes; });
}

void pack_row(int bits, const std::uint8_t* codes, std::int64_t cols, std::uint8_t* out) {
  with_bits(bits, "pack_row", [&](auto width) {
    using U = Unit<width()>;
    std::int64_t c = 0;
    for (; c + U::kUnitCodes <= cols; c += U::kUnitCodes, out += U::kUnitBytes) {
      U::pack(codes + c, out);
    }
    if (c == cols) return;
    std::uint8_t tail[U::kUnitCodes] = {};
    std::memcpy(tail, codes + c, static_cast<std::size_t>(cols - c));
    U::pack(tail, out);
  });
}

void unpack_row(int bits, const std::uint8_t* packed, std::int64_t cols, std::uint8_t* codes) {
  with_bits(bits, "unpack_row", [&](auto width) {
    using U = Unit<width()>;
    std::int64_t c = 0;
    for (; c + U::kUnitCodes <= cols; c += U::kUnitCodes, packed += U::kUnitBytes) {
      U::unpack(packed, codes + c);
    }
    if (c == cols) return;
    std::uint8_t tail[U::kUnitCodes];
    U::unpack(packed, tail);
    std::memcpy(codes + c, tail, static_cast<std::size_t>(cols - c));
  });
}

}  // namespace quantal

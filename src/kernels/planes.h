// How the codes of one width lie in a row (quantal/packed.h): constants alone, so that host code,
// device code and files of one instruction set may include them and no function is shared.
#pragma once

#include <cstdint>

namespace quantal {

/// A code of kBits is kLow bits and, above them, kHigh bits, which lie in planes of their own: 3 =
/// 2 + 1, 5 = 4 + 1, 6 = 4 + 2. A chunk is 16 codes of consecutive columns, a byte of a plane each.
template <int kBits>
struct Planes {
  static constexpr int kHigh = kBits == 3 || kBits == 5 ? 1 : kBits == 6 ? 2 : 0;  // 0: one plane
  static constexpr int kLow = kBits - kHigh;
  static constexpr int kFields = 8 / kLow;  // chunks of a low strip
  // A unit is one strip of 16 bytes of its highest plane, and what goes with it.
  static constexpr int kUnitChunks = 8 / (kHigh != 0 ? kHigh : kLow);
  static constexpr std::int64_t kUnitCodes = 16 * kUnitChunks;
  static constexpr std::int64_t kUnitBytes = kUnitCodes * kBits / 8;
  static constexpr std::int64_t kLowBytes = kUnitCodes * kLow / 8;  // its first bytes
};

}  // namespace quantal

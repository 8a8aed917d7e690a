// The widths that a packed code may have, as constants of the type system. Not for files of one
// instruction set: what they instantiate must be their own.
#pragma once

#include <type_traits>

#include "kernels/host_device.h"

namespace quantal {

/// 1, 2, 3, 4, 5, 6 and 8.
constexpr bool is_width(int bits) { return bits >= 1 && bits <= 8 && bits != 7; }
inline constexpr const char* kWidthNames = "1, 2, 3, 4, 5, 6 or 8";

/// fn(std::integral_constant<int, bits>) of a width that is_width.
QUANTAL_EITHER_SIDE
template <class Fn>
QUANTAL_HD auto with_width(int bits, Fn fn) {
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
    default:
      return fn(std::integral_constant<int, 8>{});
  }
}

}  // namespace quantal

// How much of a weight is decoded at a time where the framework multiplies.
#pragma once

#include <cstdint>

namespace quantal {

/// Bytes of decoded weights that a product holds at a time. Half of a usual last-level cache slice:
/// larger panels gain nothing, smaller ones lose to the fixed cost of a product.
inline constexpr std::int64_t kPanelBytes = 8 << 20;
/// Below these, products of panels were measured 1.2 to 1.5 times slower.
inline constexpr std::int64_t kMinPanelRows = 256;
inline constexpr std::int64_t kMinPanelCols = 128;

}  // namespace quantal

// A packed weight of any device, decoded by operators of torch.
#pragma once

#include <optional>

#include "torch/aten_stats.h"
#include "torch/device_tensor.h"

namespace quantal::stable_ops {

/// Decodes with the bits of quantal::dequantize: one operator for each step of quantal::Offset, all
/// of them elementwise in float32 and rounded half to even, so that no device may contract two.
///
/// Blocks of about `block` weights are decoded at a time; each takes some ten bytes a weight beside
/// the result while it lasts. How many operators run, and on which shapes, follows from the spec
/// alone: nothing waits for the device, and graphs can hold them.
class [[gnu::visibility("hidden")]] AtenPacked : public DevicePacked {
 public:
  static constexpr std::int64_t kBlock = 8 << 20;

  /// Throws what DevicePacked throws.
  AtenPacked(const char* where, const Tensor& codes, const Tensor& stats, const Tensor& shared,
             const Ints& spec_ints, std::int64_t block = kBlock);

  /// w of a panel into `out` [rows, cols] of a weight dtype. col_begin is a multiple of
  /// kColumnUnit.
  void decode(const Panel& panel, const Tensor& out) const;
  /// The same into a new tensor.
  Tensor decoded(const Panel& panel, ScalarType type) const;
  /// code - centre of integers: float32 [rows, cols].
  Tensor numbers(const Panel& panel) const;
  /// Scales of rows that have one group each: float32 [rows, 1].
  Tensor row_scales() const;
  /// Calls fn(rows, values) for blocks of whole rows with their float32 values.
  template <class Fn>
  void for_rows(Fn fn) const {
    const Panel whole{0, spec().rows, 0, spec().cols};
    for (std::int64_t row = 0; row < spec().rows;) {
      const std::int64_t end = row + stats_of_.block_rows(whole, row, block_);
      fn(RowRange{row, end}, block({row, end, 0, spec().cols}));
      row = end;
    }
  }

 private:
  struct Plane {
    int bits;
    std::optional<Tensor> shifts, mask;
  };

  Plane plane(int bits) const;
  Tensor fields(const Plane& plane, const Tensor& strips) const;
  Tensor codes_of(const Panel& block) const;
  Tensor mapped(const Tensor& codes) const;
  Tensor block(const Panel& block) const;

  std::int64_t block_;
  AtenStats stats_of_;
  Plane low_, high_;
  std::optional<Tensor> table_;
};

}  // namespace quantal::stable_ops

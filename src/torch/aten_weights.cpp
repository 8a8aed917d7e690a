#include "torch/aten_weights.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/layout.h"
#include "kernels/planes.h"
#include "kernels/widths.h"
#include "torch/panel_products.h"

namespace quantal::stable_ops {
namespace {

constexpr std::int64_t kStripBytes = 16;

}  // namespace

AtenPacked::AtenPacked(const char* where, const Tensor& codes, const Tensor& stats,
                       const Tensor& shared, const Ints& spec_ints, std::int64_t block)
    : DevicePacked(where, Placing::kContiguous, codes, stats, shared, spec_ints),
      block_(block),
      stats_of_(spec(), this->stats(), this->shared()),
      low_(plane(with_width(spec().bits, [](auto bits) { return Planes<bits()>::kLow; }))),
      high_(plane(spec().bits - low_.bits)) {
  if (const auto* fixed = fixed_table(spec().code_map)) {
    table_ = aten::values(codes, *fixed, ScalarType::Float);
  } else if (spec().code_map == CodeMap::kTable) {
    table_ = elements_at(this->shared(), 0, 16, ScalarType::Float);
  }
}

// ------------------------------------------------------------------ codes

AtenPacked::Plane AtenPacked::plane(int bits) const {
  Plane out{bits, std::nullopt, std::nullopt};
  if (bits == 0 || bits == 8) return out;
  std::vector<float> shifts;
  for (int shift = 0; shift < 8; shift += bits) shifts.push_back(static_cast<float>(shift));
  out.shifts = aten::reshape(aten::values(codes(), shifts, ScalarType::Byte), {8 / bits, 1});
  out.mask = aten::scalar(codes(), (1 << bits) - 1, ScalarType::Byte);
  return out;
}

/// The codes of strips [.., 16 n bytes]: [.., 128 n / bits].
Tensor AtenPacked::fields(const Plane& plane, const Tensor& strips) const {
  const std::int64_t rows = strips.size(0), units = strips.size(1);
  if (!plane.shifts) return strips;
  const std::int64_t count = strips.size(2) / kStripBytes, fields = 8 / plane.bits;
  const Tensor bytes = aten::reshape(strips, {rows, units, count, 1, kStripBytes});
  const Tensor codes = aten::bit_and(aten::shift_right(bytes, *plane.shifts), *plane.mask);
  return aten::reshape(codes, {rows, units, count * fields * kStripBytes});
}

/// uint8 [rows, cols].
Tensor AtenPacked::codes_of(const Panel& b) const {
  const std::int64_t rows = b.row_end - b.row_begin, cols = b.col_end - b.col_begin;
  const std::int64_t unit = unit_codes(spec().bits), bytes = unit_bytes(spec().bits);
  const std::int64_t first = b.col_begin / unit, count = ceil_div(b.col_end, unit) - first;
  const Tensor all = aten::reshape(codes(), {spec().rows, ceil_div(spec().cols, unit) * bytes});
  const Tensor found =
      aten::narrow(aten::narrow(all, 0, b.row_begin, rows), 1, first * bytes, count * bytes);
  const Tensor units = aten::reshape(found, {rows, count, bytes});
  const std::int64_t low_bytes = unit * low_.bits / 8;
  Tensor out = fields(low_, aten::narrow(units, 2, 0, low_bytes));
  if (high_.bits != 0) {
    const Tensor high = fields(high_, aten::narrow(units, 2, low_bytes, bytes - low_bytes));
    const Tensor shift = aten::scalar(out, low_.bits, ScalarType::Byte);
    out = aten::bit_or(out, aten::shift_left(high, shift));
  }
  return aten::narrow(aten::reshape(out, {rows, count * unit}), 1, 0, cols);
}

Tensor AtenPacked::mapped(const Tensor& codes) const {
  if (spec().code_map == CodeMap::kE4M3 || spec().code_map == CodeMap::kE5M2) {
    return small_floats(codes, spec().code_map);
  }
  if (table_) {
    const Ints sizes(codes.sizes().begin(), codes.sizes().end());
    const Tensor index = aten::reshape(aten::cast(codes, ScalarType::Int), {codes.numel()});
    return aten::reshape(aten::pick(*table_, 0, index), sizes);
  }
  const Tensor numbers = aten::cast(codes, ScalarType::Float);
  if (spec().centre == 0) return numbers;
  return aten::subtract(numbers, aten::scalar(codes, spec().centre, ScalarType::Float));
}

// ------------------------------------------------------------------ values

/// Float32 [rows, cols] of a block that is not empty, as defined at quantal::Offset. What a step
/// came from goes before it is rounded: memory holds two or three of the block's matrices.
Tensor AtenPacked::block(const Panel& b) const {
  const BlockStats s = stats_of_.of(b);
  Tensor v = aten::reshape(mapped(codes_of(b)), s.shape);
  const auto step = [&](Tensor next) {
    v = std::move(next);
    v = stats_of_.rounded(std::move(v));
  };
  const Offset offset = spec().offset;
  if (offset == Offset::kZeroPoint) step(aten::subtract(v, *s.offset));
  step(aten::multiply(v, s.scale));
  if (offset == Offset::kBias) step(aten::add(v, *s.offset));
  if (offset == Offset::kShift) step(aten::subtract(v, *s.offset));
  if (offset == Offset::kOver127) {
    step(aten::multiply(v, aten::scalar(v, kInverse127, ScalarType::Float)));
  }
  return aten::reshape(v, {b.row_end - b.row_begin, b.col_end - b.col_begin});
}

void AtenPacked::decode(const Panel& panel, const Tensor& out) const {
  const std::int64_t width = panel.col_end - panel.col_begin;
  if (width == 0) return;
  const std::int64_t fitting = std::max(block_ / kColumnUnit, std::int64_t{1});
  const std::int64_t step = stats_of_.whole_rows() ? width : std::min(width, fitting * kColumnUnit);
  for (std::int64_t col = panel.col_begin; col < panel.col_end; col += step) {
    Panel part = panel;
    part.col_begin = col;
    part.col_end = std::min(col + step, panel.col_end);
    for (std::int64_t row = panel.row_begin; row < panel.row_end;) {
      const std::int64_t end = row + stats_of_.block_rows(part, row, block_);
      const Tensor rows = aten::narrow(out, 0, row - panel.row_begin, end - row);
      Tensor target = aten::narrow(rows, 1, col - panel.col_begin, part.col_end - col);
      stable::copy_(target, block({row, end, part.col_begin, part.col_end}));
      row = end;
    }
  }
}

Tensor AtenPacked::decoded(const Panel& panel, ScalarType type) const {
  const Ints sizes{panel.row_end - panel.row_begin, panel.col_end - panel.col_begin};
  Tensor out = empty_like_of(codes(), sizes, type);
  decode(panel, out);
  return out;
}

Tensor AtenPacked::numbers(const Panel& panel) const { return mapped(codes_of(panel)); }

Tensor AtenPacked::row_scales() const {
  return stats_of_.of({0, spec().rows, 0, spec().cols}).scale;
}

}  // namespace quantal::stable_ops

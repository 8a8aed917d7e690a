// Products over decoded panels of a packed weight: the framework multiplies, a caller decodes.
#pragma once

#include <algorithm>
#include <optional>

#include "kernels/panels.h"
#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

struct PanelSizes {
  std::int64_t bytes;     ///< of a decoded panel, more where its least sizes need it
  std::int64_t min_rows;  ///< of panels of rows
  std::int64_t min_cols;  ///< of panels of columns, a multiple of kColumnUnit
  bool into_views;        ///< products are written into columns of the result
};
/// Panels of a device: few large products; at most twice this is held with what decodes it.
inline constexpr PanelSizes kDevicePanels{
    .bytes = 64 << 20, .min_rows = 1, .min_cols = kColumnUnit, .into_views = true};

inline std::int64_t bytes_of_element(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

/// A view [m, width] without history of a contiguous tensor.
inline Tensor as_matrix(const Tensor& t, std::int64_t width) {
  const std::array<std::int64_t, 2> shape{width == 0 ? 0 : t.numel() / width, width};
  return stable::view(detached(t), {shape.data(), shape.size()});
}

/// Calls multiply(out) with columns [begin, begin + count) of `result`, or with a tensor of their
/// own that is copied there.
template <class Multiply>
void into_columns(const PanelSizes& sizes, Tensor& result, std::int64_t begin, std::int64_t count,
                  Multiply multiply) {
  Tensor columns = stable::narrow(result, 1, begin, count);
  if (sizes.into_views || count == result.size(1)) return multiply(columns);
  Tensor fresh = empty_like_of(result, {result.size(0), count}, result.scalar_type());
  multiply(fresh);
  stable::copy_(columns, fresh);
}

/// y[:, r0:r1] = x @ w[r0:r1, :]^T (+ bias[r0:r1]), a panel of rows at a time. `decode(panel)`
/// gives a tensor of x's type; x [m, cols] and y [m, rows] have no history, bias is of x's type.
template <class Decode>
void linear_by_panels(const PackedSpec& spec, const PanelSizes& sizes, Decode decode,
                      const Tensor& x, const std::optional<Tensor>& bias, Tensor& y) {
  const std::int64_t element = bytes_of_element(x.scalar_type());
  const std::int64_t step =
      std::min(spec.rows, std::max(sizes.min_rows, sizes.bytes / (spec.cols * element)));
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t count = std::min(step, spec.rows - begin);
    const Tensor panel = decode(Panel{begin, begin + count, 0, spec.cols});
    std::optional<Tensor> part = bias;
    if (part && count < spec.rows) part = stable::narrow(*part, 0, begin, count);
    into_columns(sizes, y, begin, count,
                 [&](Tensor& out) { call("aten::linear", "out", x, panel, part, out); });
  }
}

/// dx[:, c0:c1] = g @ w[:, c0:c1], a panel of columns over all rows at a time, so that each element
/// of dx is one reduction inside the framework's product.
template <class Decode>
void grad_by_panels(const PackedSpec& spec, const PanelSizes& sizes, Decode decode, const Tensor& g,
                    Tensor& dx) {
  const std::int64_t element = bytes_of_element(g.scalar_type());
  const std::int64_t fitting = std::max(sizes.min_cols, sizes.bytes / (spec.rows * element));
  const std::int64_t step = std::min(spec.cols, fitting / kColumnUnit * kColumnUnit);
  for (std::int64_t begin = 0; begin < spec.cols; begin += step) {
    const std::int64_t count = std::min(step, spec.cols - begin);
    const Tensor panel = decode(Panel{0, spec.rows, begin, begin + count});
    into_columns(sizes, dx, begin, count,
                 [&](Tensor& out) { call("aten::mm", "out", g, panel, out); });
  }
}

}  // namespace quantal::stable_ops

// ATen operators that the ops of ops_aten.cpp are made of, called through the dispatcher: what a
// device has for torch, it has for them. Numbers cannot pass the stable ABI, so they travel as
// tensors of one element that the device fills: nothing here is copied from or to the host, and
// nothing waits.
#pragma once

#include <span>

#include "torch/stable_tensor.h"

namespace quantal::stable_ops::aten {

// ------------------------------------------------------------------ views

Tensor narrow(const Tensor& t, std::int64_t dim, std::int64_t begin, std::int64_t count);
/// A view where strides allow it, else a copy.
Tensor reshape(const Tensor& t, const Ints& sizes);
Tensor expand(const Tensor& t, const Ints& sizes);
/// The same bytes as elements of another type.
Tensor seen_as(const Tensor& t, ScalarType type);

// ------------------------------------------------------------------ new tensors

/// A contiguous copy in memory of its own.
Tensor compact(const Tensor& t);
/// The values in another type, rounded half to even; `t` itself if it has the type.
Tensor cast(const Tensor& t, ScalarType type);
/// One element, on the device of `like`.
Tensor scalar(const Tensor& like, double value, ScalarType type);
/// A few values, one fill each.
Tensor values(const Tensor& like, std::span<const float> list, ScalarType type);
/// first, first + step, .. as int64.
Tensor counting(const Tensor& like, std::int64_t count, std::int64_t first = 0,
                std::int64_t step = 1);

/// a + b and a - b of floats.
Tensor add(const Tensor& a, const Tensor& b);
Tensor subtract(const Tensor& a, const Tensor& b);
Tensor multiply(const Tensor& a, const Tensor& b);
Tensor divide(const Tensor& a, const Tensor& b);
Tensor bit_and(const Tensor& a, const Tensor& b);
Tensor bit_or(const Tensor& a, const Tensor& b);
Tensor shift_left(const Tensor& a, const Tensor& b);
Tensor shift_right(const Tensor& a, const Tensor& b);
Tensor minimum(const Tensor& a, const Tensor& b);
Tensor maximum(const Tensor& a, const Tensor& b);
Tensor at_least(const Tensor& a, const Tensor& b);  ///< a >= b
Tensor equal(const Tensor& a, const Tensor& b);     ///< a == b
/// `condition` ? a : b.
Tensor choose(const Tensor& condition, const Tensor& a, const Tensor& b);
Tensor magnitude(const Tensor& t);
/// The largest along a dimension, which stays with one element; NaN if there is one.
Tensor largest(const Tensor& t, std::int64_t dim);
/// Along a dimension, which goes.
Tensor sum(const Tensor& t, std::int64_t dim, ScalarType type);
/// Elements of `table` along `dim` by a list of int32 or int64.
Tensor pick(const Tensor& table, std::int64_t dim, const Tensor& index);
/// out[r, c] = table[r, index[r, c]] with an int64 index.
Tensor pick_in_rows(const Tensor& table, const Tensor& index);

}  // namespace quantal::stable_ops::aten

#include "torch/aten.h"

namespace quantal::stable_ops::aten {
namespace {

using torch::headeronly::MemoryFormat;

Tensor binary(const char* name, const Tensor& a, const Tensor& b) {
  return call(name, "Tensor", a, b);
}

}  // namespace

Tensor narrow(const Tensor& t, std::int64_t dim, std::int64_t begin, std::int64_t count) {
  Tensor self = t;  // stable::narrow takes a tensor that it could change
  return stable::narrow(self, dim, begin, count);
}
Tensor reshape(const Tensor& t, const Ints& sizes) {
  return stable::reshape(t, {sizes.data(), sizes.size()});
}
Tensor expand(const Tensor& t, const Ints& sizes) {
  return call("aten::expand", "", t, sizes, false);
}
Tensor seen_as(const Tensor& t, ScalarType type) { return call("aten::view", "dtype", t, type); }

Tensor compact(const Tensor& t) {
  return call("aten::clone", "", t, std::optional(MemoryFormat::Contiguous));
}
Tensor cast(const Tensor& t, ScalarType type) { return stable::to(t, type); }

Tensor scalar(const Tensor& like, double value, ScalarType type) {
  return stable::fill_(empty_like_of(like, {}, type), value);
}

Tensor values(const Tensor& like, std::span<const float> list, ScalarType type) {
  const auto count = static_cast<std::int64_t>(list.size());
  Tensor out = empty_like_of(like, {count}, type);
  for (std::int64_t i = 0; i < count; ++i) {
    stable::fill_(stable::narrow(out, 0, i, 1),
                  static_cast<double>(list[static_cast<std::size_t>(i)]));
  }
  return out;
}

Tensor counting(const Tensor& like, std::int64_t count, std::int64_t first, std::int64_t step) {
  Tensor steps = empty_like_of(like, {count}, ScalarType::Int);
  if (count == 0) return cast(steps, ScalarType::Long);
  stable::fill_(steps, static_cast<double>(step));
  stable::fill_(stable::narrow(steps, 0, 0, 1), static_cast<double>(first));
  return call("aten::cumsum", "", steps, std::int64_t{0}, std::optional(ScalarType::Long));
}

Tensor add(const Tensor& a, const Tensor& b) { return stable::subtract(a, b, -1.0); }
Tensor subtract(const Tensor& a, const Tensor& b) { return stable::subtract(a, b, 1.0); }
Tensor multiply(const Tensor& a, const Tensor& b) { return binary("aten::mul", a, b); }
Tensor divide(const Tensor& a, const Tensor& b) { return binary("aten::div", a, b); }
Tensor bit_and(const Tensor& a, const Tensor& b) { return binary("aten::bitwise_and", a, b); }
Tensor bit_or(const Tensor& a, const Tensor& b) { return binary("aten::bitwise_or", a, b); }
Tensor shift_left(const Tensor& a, const Tensor& b) {
  return binary("aten::bitwise_left_shift", a, b);
}
Tensor shift_right(const Tensor& a, const Tensor& b) {
  return binary("aten::bitwise_right_shift", a, b);
}
Tensor minimum(const Tensor& a, const Tensor& b) { return call("aten::minimum", "", a, b); }
Tensor maximum(const Tensor& a, const Tensor& b) { return call("aten::maximum", "", a, b); }
Tensor at_least(const Tensor& a, const Tensor& b) { return binary("aten::ge", a, b); }
Tensor equal(const Tensor& a, const Tensor& b) { return binary("aten::eq", a, b); }
Tensor choose(const Tensor& condition, const Tensor& a, const Tensor& b) {
  return call("aten::where", "self", condition, a, b);
}
Tensor magnitude(const Tensor& t) { return call("aten::abs", "", t); }
Tensor largest(const Tensor& t, std::int64_t dim) {
  return call("aten::amax", "", t, Ints{dim}, true);
}
Tensor sum(const Tensor& t, std::int64_t dim, ScalarType type) {
  return call("aten::sum", "dim_IntList", t, std::optional(Ints{dim}), false, std::optional(type));
}
Tensor pick(const Tensor& table, std::int64_t dim, const Tensor& index) {
  return call("aten::index_select", "", table, dim, index);
}
Tensor pick_in_rows(const Tensor& table, const Tensor& index) {
  return call("aten::gather", "", table, std::int64_t{1}, index, false);
}

}  // namespace quantal::stable_ops::aten

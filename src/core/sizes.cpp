#include <string>

#include "quantal/core.h"

namespace quantal {
namespace {

[[noreturn]] void fail_size(std::int64_t a, char op, std::int64_t b, std::string_view what) {
  fail(Errc::kShape, std::string(what) + " is " + std::to_string(a) + " " + op + " " +
                         std::to_string(b) + ", expected sizes >= 0 whose result fits 63 bits");
}

}  // namespace

std::int64_t checked_mul(std::int64_t a, std::int64_t b, std::string_view what) {
  std::int64_t result = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) fail_size(a, '*', b, what);
  return result;
}

std::int64_t checked_add(std::int64_t a, std::int64_t b, std::string_view what) {
  std::int64_t result = 0;
  if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &result)) fail_size(a, '+', b, what);
  return result;
}

std::int64_t checked_numel(std::span<const std::int64_t> shape, std::string_view what) {
  // A zero dimension makes the product zero, but the others must still be legal on their own.
  std::int64_t product = 1;
  bool empty = false;
  for (const std::int64_t dim : shape) {
    if (dim == 0) {
      empty = true;
    } else {
      product = checked_mul(product, dim, what);
    }
  }
  return empty ? 0 : product;
}

std::string shape_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::int64_t TensorView::numel() const { return checked_numel(shape, "tensor elements"); }

Tensor make_tensor(DType dtype, std::vector<std::int64_t> shape) {
  const std::int64_t bytes =
      checked_mul(checked_numel(shape, "tensor elements"),
                  static_cast<std::int64_t>(dtype_size(dtype)), "tensor bytes");
  return {dtype, std::move(shape), std::vector<std::uint8_t>(static_cast<std::size_t>(bytes))};
}

}  // namespace quantal

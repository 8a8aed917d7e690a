// What the products among the stable-ABI ops share: biases, outputs that are given, meta kernels.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

/// True if a bias was given.
bool given(const std::optional<Tensor>& bias);
/// Throws Error{kDevice}, Error{kDtype} or Error{kShape}.
void check_bias(const Tensor& bias, std::int64_t rows);
/// A checked bias as kernels take it, float32; `wide` holds it where it has another form.
const float* bias_values(const std::optional<Tensor>& bias, std::int64_t rows,
                         std::vector<float>& wide);

/// The dtype of a weight that `spec` can hold. Throws Error{kDtype} or Error{kShape}.
DType checked_weight(const Tensor& weight, const PackedSpec& spec);

/// True if the memory that two tensors span overlaps.
bool share_memory(const Tensor& a, const Tensor& b);

/// Throws Error{kDtype} or Error{kShape} unless `out` takes a product of `x` with this last
/// dimension.
void check_out(const char* what, const Tensor& out, const Tensor& x, std::int64_t width);
/// The same for an `out` of a decoded matrix, which must be contiguous.
void check_dense_out(const std::string& what, const Tensor& out, const PackedSpec& spec);

/// Checks `out` and calls `product` with contiguous rows: those of out itself, or fresh ones that
/// are copied where out has gaps or shares memory with an operand.
template <class Product>
void write_into(const char* what, Tensor& out, const Tensor& x, const std::optional<Tensor>& bias,
                std::int64_t width, Product product) {
  check_cpu(what, out);
  check_out(what, out, x, width);
  if (out.is_contiguous() && !share_memory(out, x) && !(bias && share_memory(out, *bias))) {
    Rows y(what, out, width);
    product(y);
    return;
  }
  Rows y = Rows::fresh(x, width);
  product(y);
  Tensor target = detached(out);
  stable::copy_(target, y.tensor());
}

/// A fresh contiguous tensor with the sizes of `t`, the last one replaced. Sizes may be symbolic
/// here and cannot be read through the stable ABI, so they travel inside views.
Tensor meta_with_last(const Tensor& t, std::int64_t last);

}  // namespace quantal::stable_ops

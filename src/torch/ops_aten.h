// The ops of ops_stable.cpp, ops_activations.cpp and ops_weights.cpp for tensors of any device, in
// operators of torch. Functions of their own: those of a GPU choose between them and kernels, and
// tests call them with tensors on the CPU.
#pragma once

#include <optional>
#include <tuple>

#include "torch/aten_weights.h"
#include "torch/panel_products.h"

namespace quantal::stable_ops {

std::tuple<Tensor, Tensor, Tensor> quantize_aten(Tensor weight, Ints spec);
Tensor dequantize_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type);
void dequantize_out_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, Tensor out);
Tensor linear_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                   Ints spec);
void linear_out_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                     std::optional<Tensor> bias, Ints spec, Tensor out);
Tensor linear_int8_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                        std::optional<Tensor> bias, Ints spec, double threshold);
Tensor linear_int8_activations_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                    std::optional<Tensor> bias, Ints spec);
void linear_int8_activations_out_aten(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                                      std::optional<Tensor> bias, Ints spec, Tensor out);
Tensor linear_grad_input_aten(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec);
void linear_grad_input_out_aten(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec,
                                Tensor out);
Tensor row_square_sums_aten(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type);
double sampled_error_aten(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec);
Tensor merge_survival_aten(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                           Tensor new_stats, Tensor new_shared, Ints spec, Tensor target);

/// y = x w^T (+ bias) and dx = g w over panels of these sizes; x and g are checked rows.
Tensor aten_product(const AtenPacked& w, const PanelSizes& sizes, const Tensor& x,
                    const std::optional<Tensor>& bias);
Tensor aten_gradient(const AtenPacked& w, const PanelSizes& sizes, const Tensor& g);
/// The product of LLM.int8 (aten_int8.cpp); at most `most` numbers are held at a time.
Tensor aten_int8_product(const AtenPacked& w, const Tensor& x, const std::optional<Tensor>& bias,
                         float threshold, std::int64_t most = AtenPacked::kBlock);

}  // namespace quantal::stable_ops

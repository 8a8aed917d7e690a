// The ops of ops_stable.cpp and ops_weights.cpp for tensors on a GPU. Functions of their own, so
// that tests can call them with another library of kernels.
#pragma once

#include <optional>
#include <tuple>

#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(Tensor weight, Ints spec);
Tensor dequantize_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type);
void dequantize_out_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, Tensor out);
Tensor linear_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared, std::optional<Tensor> bias,
                   Ints spec);
void linear_out_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                     std::optional<Tensor> bias, Ints spec, Tensor out);
Tensor linear_int8_cuda(Tensor x, Tensor codes, Tensor stats, Tensor shared,
                        std::optional<Tensor> bias, Ints spec, double threshold);
Tensor linear_grad_input_cuda(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec);
void linear_grad_input_out_cuda(Tensor grad, Tensor codes, Tensor stats, Tensor shared, Ints spec,
                                Tensor out);
double sampled_error_cuda(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec);
Tensor merge_survival_cuda(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                           Tensor new_stats, Tensor new_shared, Ints spec, Tensor target);
Tensor row_square_sums_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec);

}  // namespace quantal::stable_ops

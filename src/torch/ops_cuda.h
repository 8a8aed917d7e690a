// The ops of ops_stable.cpp and ops_weights.cpp for tensors on a GPU. Functions of their own, so
// that tests can call them with another library of kernels, or none.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "torch/cuda_library.h"
#include "torch/ops_aten.h"

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
Tensor row_square_sums_cuda(Tensor codes, Tensor stats, Tensor shared, Ints spec, ScalarType type);

/// What tensors on a GPU get.
namespace gpu {

/// An op by kernels where they are in use, else by torch's operators.
template <auto kKernels, auto kAten>
struct Chosen;
template <class Result, class... Args, Result (*kKernels)(Args...), Result (*kAten)(Args...)>
struct Chosen<kKernels, kAten> {
  static Result call(Args... args) {
    const bool kernels = cuda_library().functions != nullptr;
    return (kernels ? &Explained<kKernels>::call : &Explained<kAten>::call)(std::move(args)...);
  }
};

using Dequantize = Chosen<&dequantize_cuda, &dequantize_aten>;
using DequantizeOut = Chosen<&dequantize_out_cuda, &dequantize_out_aten>;
using Linear = Chosen<&linear_cuda, &linear_aten>;
using LinearOut = Chosen<&linear_out_cuda, &linear_out_aten>;
using LinearInt8 = Chosen<&linear_int8_cuda, &linear_int8_aten>;
using GradInput = Chosen<&linear_grad_input_cuda, &linear_grad_input_aten>;
using GradInputOut = Chosen<&linear_grad_input_out_cuda, &linear_grad_input_out_aten>;
using RowSquareSums = Chosen<&row_square_sums_cuda, &row_square_sums_aten>;

}  // namespace gpu

}  // namespace quantal::stable_ops

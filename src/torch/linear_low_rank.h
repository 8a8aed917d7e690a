// A packed linear layer and a LoRA adapter in one step, for C++ programs.
#pragma once

#include "quantal/torch/ops.h"

namespace quantal {

/// An adapter on the CPU: `scaling * B A`, both matrices float32, float16 or bfloat16.
struct LowRankTensors {
  torch::Tensor a;  ///< [rank, in]
  torch::Tensor b;  ///< [out, rank]
  double scaling = 1;
};

/// `x W^T + bias + scaling (seen A^T) B^T` in the dtype of x (f32, f16 or bf16), on the CPU; `seen`
/// is x or, where the adapter drops some of it, another tensor of its sizes and dtype. The product
/// with W is computed in `compute_dtype`, what the adapter adds in float32, whatever its matrices
/// are, rounded once. Differentiable, also twice, in x, seen, bias, A and B, whose gradients are
/// rounded once to their dtypes. Throws what linear() throws.
torch::Tensor linear_low_rank(const torch::Tensor& x, const torch::Tensor& seen,
                              const PackedTensors& w, const torch::Tensor& bias,
                              torch::ScalarType compute_dtype, const LowRankTensors& adapter);

}  // namespace quantal

// The product with a packed weight and its gradient by x, for autograd functions.
#pragma once

#include "quantal/torch/ops.h"

namespace quantal {

/// `grad W` [..., cols] of `grad` [..., rows]; differentiable in grad where gradients are recorded.
torch::Tensor linear_grad_input(const torch::Tensor& grad, const PackedTensors& w);

}  // namespace quantal

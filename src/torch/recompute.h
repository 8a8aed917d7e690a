// Activation checkpointing for C++: recompute a piece of the forward pass during backward.
#pragma once

#include <torch/types.h>

#include <functional>

namespace quantal {

/// `body(x)` whose activations are not kept: backward runs it again, with the state that torch's
/// CPU generator had, so dropout repeats itself. Parameters inside `body` receive their gradients
/// by accumulation, as with torch.utils.checkpoint(use_reentrant=True): x must require grad, and
/// torch::autograd::grad over those parameters is not supported, backward() is.
torch::Tensor recompute_in_backward(const std::function<torch::Tensor(const torch::Tensor&)>& body,
                                    const torch::Tensor& x);

}  // namespace quantal

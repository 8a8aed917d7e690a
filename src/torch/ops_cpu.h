// Ops for tensors on the CPU that those of other devices use: through the dispatcher, errors would
// lose their text at the C boundary of the stable ABI.
#pragma once

#include <tuple>

#include "torch/stable_tensor.h"

namespace quantal::stable_ops {

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(Tensor weight, Ints spec);
/// Throws Error{kDtype} unless row_square_sums gives it.
void check_sum_dtype(ScalarType type);
double sampled_error_cpu(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec);
Tensor merge_survival_cpu(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                          Tensor new_stats, Tensor new_shared, Ints spec, Tensor target);

}  // namespace quantal::stable_ops

// matmul_int8_activations by a given set of kernels (tests run those that are not chosen here), and
// its rule for activations.
#pragma once

#include "kernels/cpu/int_kernels.h"
#include "quantal/kernels.h"

namespace quantal {

/// As the public function (quantal/kernels.h).
void matmul_int8_activations(const IntKernels& kernels, const PackedView& w, DType dtype,
                             const void* x, std::int64_t m_rows, const float* bias, void* y,
                             const Executor& executor);

/// Columns of a run of activations: the largest power of two up to 128 that divides a group. A
/// group that is the whole row is cut into runs of 128.
std::int64_t int8_activation_run(const PackedSpec& spec);

}  // namespace quantal

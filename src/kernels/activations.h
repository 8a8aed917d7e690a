// matmul_int8_activations by a given set of kernels: tests run those that are not chosen here.
#pragma once

#include "kernels/cpu/int_kernels.h"
#include "quantal/kernels.h"

namespace quantal {

/// As the public function (quantal/kernels.h).
void matmul_int8_activations(const IntKernels& kernels, const PackedView& w, DType dtype,
                             const void* x, std::int64_t m_rows, const float* bias, void* y,
                             const Executor& executor);

}  // namespace quantal

// The kernel set in use, and packed matrices as kernels take them.
#pragma once

#include "kernels/cpu/cpu_kernels.h"
#include "quantal/kernels.h"

namespace quantal {

/// The active set; resolves QUANTAL_CPU on first use (throws Error{kDevice}). Thread-safe.
const CpuKernels& cpu_kernels();

/// Pointers and tables of a packed matrix, after check_packed (throws what that throws).
KernelMatrix kernel_matrix(const PackedView& w);

/// kF32, kF16 or kBF16; throws Error{kDtype} "<where>: <what> is <dtype>, expected f32, f16 or
/// bf16".
FloatKind float_kind(DType dtype, const char* where, const char* what);

}  // namespace quantal

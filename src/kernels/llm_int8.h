// Numbers of the product of LLM.int8 (quantal/kernels.h, matmul_int8) that all its forms share.
#pragma once

#include "quantal/kernels.h"

namespace quantal {

inline constexpr float kInt8Levels = 127.0F;
/// Upstream's constant for 1 / 127^2, 1.8e-5 above it.
inline constexpr float kInt8Unit = 6.200124e-05F;

/// Throws Error{kUnsupported} unless the weights are 8-bit integers over 127 with one scale per
/// row, Error{kConfig} for a negative threshold.
void check_llm_int8(const PackedSpec& spec, float threshold);

}  // namespace quantal

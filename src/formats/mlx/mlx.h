// The MLX dialect.
#pragma once

#include "quantal/formats.h"

namespace quantal::mlx {

/// Affine codes of 1, 2, 3, 4, 5, 6 and 8 bits and the modes mxfp4, nvfp4 and mxfp8, as mlx 0.32.4
/// on the CPU.
extern const Dialect kDialect;

}  // namespace quantal::mlx

// MLX: choosing codes, scales and biases.
#pragma once

#include <cstdint>

#include "quantal/formats.h"

namespace quantal::mlx {

/// Dialect::make_spec. `mode` chooses affine or a floating mode; bits 0 and group_size 0 mean the
/// mode's own. The methods MLX_INT4 and MLX_INT8 fix the width; other widths are for callers that
/// name the dialect.
PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// Dialect::quantize, bit-exact with mx.quantize of mlx 0.32.4 on the CPU. Affine: of the weights
/// rounded to value_dtype. Floating modes: of the weights in their own type.
void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

}  // namespace quantal::mlx

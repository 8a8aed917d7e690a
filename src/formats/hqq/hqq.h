// The HQQ dialect.
#pragma once

#include "quantal/formats.h"

namespace quantal::hqq {

/// Half-quadratic quantization at 1 to 8 bits, as hqq 0.2.8.post1 on the CPU.
extern const Dialect kDialect;

}  // namespace quantal::hqq

// The bitsandbytes dialect.
#pragma once

#include "quantal/formats.h"

namespace quantal::bnb {

/// NF4 and FP4 with plain or nested absmax, and LLM.int8; bit-exact with bitsandbytes 0.50.2 on the
/// CPU.
extern const Dialect kDialect;

}  // namespace quantal::bnb

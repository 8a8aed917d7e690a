// The gguf dialect: ggml's blocks as a quantizer and as packed matrices.
#pragma once

#include "quantal/formats.h"

namespace quantal::gguf {

extern const Dialect kDialect;

}  // namespace quantal::gguf

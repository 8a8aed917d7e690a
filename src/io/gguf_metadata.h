// The key-value section of a GGUF file.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "io/byte_reader.h"
#include "quantal/io.h"

namespace quantal::io {

/// Reads `count` pairs. Throws Error{kCorrupt} for empty or duplicate keys, unknown value types,
/// counts and lengths beyond the file; Error{kUnsupported} for nested arrays.
std::vector<std::pair<std::string, GgufValue>> read_gguf_metadata(ByteReader& reader,
                                                                  std::uint64_t count);

}  // namespace quantal::io

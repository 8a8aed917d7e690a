// The key-value section of a GGUF file.
#pragma once

#include <string>
#include <vector>

#include "io/byte_reader.h"
#include "quantal/io.h"

namespace quantal::io {

/// Reads `count` pairs. Throws Error{kCorrupt} for empty or duplicate keys, unknown value types,
/// counts and lengths beyond the file; Error{kUnsupported} for nested arrays.
std::vector<GgufPair> read_gguf_metadata(ByteReader& reader, std::uint64_t count);

/// Counts that stand at the begin of a file.
struct GgufCounts {
  std::uint32_t version = 0;
  std::uint64_t tensors = 0, pairs = 0;
};
/// Magic, version and counts, each checked against the size of the file. Throws Error{kCorrupt};
/// Error{kUnsupported} for other versions and, by name, for a big-endian file.
GgufCounts read_gguf_counts(ByteReader& reader);

/// Appends one pair in the form of the file. Throws Error{kConfig} as GgufWriter.
void append_gguf_pair(const GgufPair& pair, std::string& out);
/// The smallest and largest integer of a type; false for types that are no integers.
struct GgufRange {
  std::int64_t low = 0;
  std::uint64_t high = 0;
};
bool gguf_range(GgufType type, GgufRange& range);

}  // namespace quantal::io

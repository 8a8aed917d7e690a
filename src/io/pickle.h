// The pickle inside a torch file, read as data: a machine with the few opcodes that tensors and
// plain containers need. It imports nothing and calls nothing; a global is a symbol from a fixed
// list, and what is not on it ends the reading with its name.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "quantal/archive.h"

namespace quantal::io {

/// Nesting of containers that is read and written.
inline constexpr int kMostPickleDepth = 100;
/// Dimensions of a tensor, torch's own limit.
inline constexpr std::size_t kMostTorchDims = 64;

/// Where a pickle stands and what it may point at.
struct PickleSource {
  std::span<const std::uint8_t> bytes;
  std::string path;
  std::int64_t offset = 0;  ///< of the pickle in the file
  /// Checks a tensor against the storage of `storage_bytes` that the pickle declares for it; throws
  /// quantal::Error.
  std::function<void(const TorchTensor& tensor, std::int64_t storage_bytes)> check_tensor;
};

/// Reads a protocol 2 pickle. Throws Error{kUnsupported} naming opcodes, globals, calls and
/// persistent ids that are not read; Error{kCorrupt} for contradictions, cycles, duplicate keys,
/// nesting deeper than 100 and values that sharing multiplies beyond 16 million. Memory and
/// time grow with the length of the pickle, by about 100 bytes for each of its bytes at worst.
TorchValue read_torch_pickle(const PickleSource& source);

/// Protocol 2 pickle of a tree, as torch.save writes it. `storage_bytes` gives the size of a
/// tensor's storage. Throws Error{kConfig}.
std::string write_torch_pickle(
    const TorchValue& root, const std::function<std::int64_t(const TorchTensor&)>& storage_bytes);

}  // namespace quantal::io

// Strided views of a storage.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "quantal/archive.h"

namespace quantal::io {

/// What a tensor covers of its storage.
struct StridedExtent {
  std::string fault;  ///< empty, or why the view is not legal
  std::int64_t numel = 0;
  bool contiguous = false;
};

/// Checks rank, signs, overflow and `offset + sum((size - 1) * stride) < storage_bytes / itemsize`.
/// A view without elements needs no storage.
StridedExtent strided_extent(const TorchTensor& tensor, std::int64_t storage_bytes);

/// Copies a legal view into row-major order: `out[i, j ...] = storage[offset + i * s0 + j * s1
/// ...]`. `out` has numel * itemsize bytes.
void copy_strided(const TorchTensor& tensor, const std::uint8_t* storage, std::uint8_t* out);

}  // namespace quantal::io

// One .npy array in memory, as a file of its own or a member of an .npz.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "quantal/core.h"

namespace quantal::io {

/// Longest header that is read: a magic, a version, a length and 64 KiB of text.
inline constexpr std::size_t kMostNpyHeader = 12 + 65536;

/// What the header of an array says.
struct NpyLayout {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  bool swapped = false;  ///< elements are big-endian
  bool fortran_order = false;
  std::size_t data_begin = 0;  ///< in the array's bytes
  std::size_t data_bytes = 0;
};

/// Reads the header at the beginning of `head` of an array that has `bytes` bytes in all. `site`
/// goes into errors; its offset is where the array begins. Throws as read_npy.
NpyLayout read_npy_layout(std::span<const std::uint8_t> head, std::uint64_t bytes,
                          const ErrorSite& site);
/// Puts the elements into row-major, native order, in place.
void normalize_npy(const NpyLayout& layout, std::vector<std::uint8_t>& data);
/// Magic, version 1.0 and padded header of an array in C order. Throws Error{kDtype};
/// Error{kConfig} for more dimensions than a version 1.0 header can name.
std::string npy_head(const TensorView& tensor, const ErrorSite& site);
/// Reverses the bytes of each element of `size` bytes.
void swap_elements(std::span<std::uint8_t> bytes, std::size_t size);

}  // namespace quantal::io

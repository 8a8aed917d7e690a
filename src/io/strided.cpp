#include "io/strided.h"

#include <cstring>

#include "io/pickle.h"

namespace quantal::io {
namespace {

bool multiply(std::int64_t& into, std::int64_t by) {
  return !__builtin_mul_overflow(into, by, &into);
}

/// The view's dimensions without those of size 1, neighbours merged where they follow each other in
/// memory.
struct Loops {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
};

Loops merge_dimensions(const TorchTensor& tensor) {
  Loops loops;
  for (std::size_t d = 0; d < tensor.shape.size(); ++d) {
    if (tensor.shape[d] == 1) continue;
    if (!loops.sizes.empty() && loops.strides.back() == tensor.shape[d] * tensor.strides[d]) {
      loops.sizes.back() *= tensor.shape[d];
      loops.strides.back() = tensor.strides[d];
    } else {
      loops.sizes.push_back(tensor.shape[d]);
      loops.strides.push_back(tensor.strides[d]);
    }
  }
  return loops;
}

template <std::size_t kSize>
void copy_row(const std::uint8_t* from, std::int64_t stride, std::int64_t count,
              std::uint8_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(out + static_cast<std::size_t>(i) * kSize,
                from + static_cast<std::size_t>(i * stride) * kSize, kSize);
  }
}

void copy_row(std::size_t itemsize, const std::uint8_t* from, std::int64_t stride,
              std::int64_t count, std::uint8_t* out) {
  if (stride == 1) {
    std::memcpy(out, from, static_cast<std::size_t>(count) * itemsize);
  } else if (itemsize == 1) {
    copy_row<1>(from, stride, count, out);
  } else if (itemsize == 2) {
    copy_row<2>(from, stride, count, out);
  } else if (itemsize == 4) {
    copy_row<4>(from, stride, count, out);
  } else {
    copy_row<8>(from, stride, count, out);
  }
}

}  // namespace

StridedExtent strided_extent(const TorchTensor& tensor, std::int64_t storage_bytes) {
  StridedExtent extent;
  const std::size_t rank = tensor.shape.size();
  if (rank > kMostTorchDims || tensor.strides.size() != rank) {
    extent.fault = "has " + std::to_string(rank) + " sizes and " +
                   std::to_string(tensor.strides.size()) + " strides, expected as many, at most " +
                   std::to_string(kMostTorchDims);
    return extent;
  }
  const auto itemsize = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  std::int64_t numel = 1;
  std::int64_t last = tensor.offset;
  bool legal = tensor.offset >= 0;
  bool empty = false;
  extent.contiguous = true;
  std::int64_t row = 1;  // stride of a row-major tensor
  for (std::size_t d = rank; d-- > 0 && legal;) {
    const std::int64_t size = tensor.shape[d];
    std::int64_t reach = size - 1;
    legal = size >= 0 && tensor.strides[d] >= 0 && multiply(reach, tensor.strides[d]);
    empty = empty || size == 0;
    if (size > 1 && tensor.strides[d] != row) extent.contiguous = false;
    if (size > 0) {
      legal = legal && multiply(numel, size) && !__builtin_add_overflow(last, reach, &last);
      row = numel;
    }
  }
  std::int64_t bytes = numel;
  if (!legal || !multiply(bytes, itemsize)) {
    extent.fault = "has size " + shape_string(tensor.shape) + ", stride " +
                   shape_string(tensor.strides) + ", offset " + std::to_string(tensor.offset) +
                   ", expected numbers >= 0 without overflow";
    return extent;
  }
  extent.numel = empty ? 0 : numel;
  if (empty) {
    extent.contiguous = true;
  } else if (last >= storage_bytes / itemsize) {
    extent.fault = "reaches element " + std::to_string(last) + " of its storage, expected below " +
                   std::to_string(storage_bytes / itemsize);
  }
  return extent;
}

void copy_strided(const TorchTensor& tensor, const std::uint8_t* storage, std::uint8_t* out) {
  const std::size_t itemsize = dtype_size(tensor.dtype);
  Loops loops = merge_dimensions(tensor);
  if (loops.sizes.empty()) {
    loops.sizes.push_back(1);
    loops.strides.push_back(1);
  }
  const std::size_t outer = loops.sizes.size() - 1;
  const std::int64_t count = loops.sizes[outer];
  for (const std::int64_t size : loops.sizes) {
    if (size == 0) return;
  }
  std::vector<std::int64_t> index(outer, 0);
  std::int64_t from = tensor.offset;
  while (true) {
    copy_row(itemsize, storage + static_cast<std::size_t>(from) * itemsize, loops.strides[outer],
             count, out);
    out += static_cast<std::size_t>(count) * itemsize;
    std::size_t d = outer;
    while (d > 0) {
      --d;
      from += loops.strides[d];
      if (++index[d] < loops.sizes[d]) break;
      from -= loops.strides[d] * loops.sizes[d];
      index[d] = 0;
      if (d == 0) return;
    }
    if (outer == 0) return;
  }
}

}  // namespace quantal::io

// How a kernel is cut into blocks. Plain numbers, decided by host code and checked in tests.
#pragma once

#include <cstdint>

namespace quantal::cuda {

struct Geometry {
  std::int64_t blocks_x = 0, blocks_y = 1;
  int threads = 0;
  std::int64_t shared_bytes = 0;
};

inline constexpr std::int64_t kMaxBlocksX = (std::int64_t{1} << 31) - 1;
inline constexpr std::int64_t kMaxBlocksY = 65535;
/// Shared memory that a block may have on every device of compute capability 8.0 and above: 163 KiB
/// on 8.0, 227 on 9.0, but 99 on 8.6 and 8.9.
inline constexpr std::int64_t kMaxSharedBytes = 99 * 1024;

}  // namespace quantal::cuda

// Tiles of products on tensor cores: how operands lie in shared memory and how a warp multiplies
// them. Shared by the products of 16-bit floats and of int8.
//
// A tile is rows of granules of 16 bytes; granule g of row r stands at place g ^ (r & 7), so that
// the 8 rows of a matrix that one ldmatrix reads lie in different banks.
#pragma once

#include "kernels/cuda/device.h"

namespace quantal::cuda {

inline constexpr int kTileThreads = 256;  // 8 warps, 2 along rows of x, 4 along outputs
inline constexpr int kTileWidth = 128;    // outputs of a tile
inline constexpr int kStepGranules = 8;   // depth of one step: 64 16-bit floats, 128 int8
inline constexpr int kWarpOutputs = kTileWidth / 4;
inline constexpr int kOutputTiles = kWarpOutputs / 8;  // products of 8 outputs side by side

/// Byte offset of a granule in a tile whose rows have `kGranules` granules.
template <int kGranules>
QUANTAL_HD int granule_offset(int row, int granule) {
  return (row * kGranules + (granule ^ (row & 7))) * 16;
}

struct WarpPlace {
  int lane, row, output;  // first row of x and first output of the warp in the tile
};
template <int kTileRows>
QUANTAL_DEVICE WarpPlace warp_place() {
  const int warp = thread_index() / kWarp;
  return {thread_index() % kWarp, warp / 4 * (kTileRows / 2), warp % 4 * kWarpOutputs};
}

/// The 16 x 32-byte operand of rows [row, row + 16) of x at step granules 2 k, 2 k + 1.
QUANTAL_DEVICE void load_left(const unsigned char* tile, int row, int k, int lane,
                              std::uint32_t out[4]) {
  load_matrices(out, tile + granule_offset<kStepGranules>(row + lane % 16, 2 * k + lane / 16));
}
/// Two operands of 8 outputs each: {b of [output, output + 8), b of the next 8}, from rows of
/// outputs.
QUANTAL_DEVICE void load_right(const unsigned char* tile, int output, int k, int lane,
                               std::uint32_t out[4]) {
  load_matrices(out, tile + granule_offset<kStepGranules>(output + lane % 8 + lane / 16 * 8,
                                                          2 * k + lane / 8 % 2));
}
/// The same of 16-bit elements from rows along the depth, kTileWidth outputs each.
QUANTAL_DEVICE void load_right_transposed(const unsigned char* tile, int output, int k, int lane,
                                          std::uint32_t out[4]) {
  constexpr int kGranules = kTileWidth / 8;
  load_matrices_transposed(
      out, tile + granule_offset<kGranules>(16 * k + lane % 16, output / 8 + lane / 16));
}

/// Starts to copy one step of `kRows` rows from global memory: granules of row r begin at
/// base + r * stride; rows [0, rows) and bytes below `bytes` exist, others become zero.
template <int kRows>
QUANTAL_DEVICE void copy_step(unsigned char* tile, const unsigned char* base, std::int64_t stride,
                              std::int64_t rows, std::int64_t from, std::int64_t bytes) {
  QUANTAL_UNROLL
  for (int i = 0; i < kRows * kStepGranules / kTileThreads; ++i) {
    const int item = i * kTileThreads + thread_index();
    const int row = item / kStepGranules, granule = item % kStepGranules;
    const std::int64_t at = from + 16 * granule;
    const bool valid = row < rows && at < bytes;
    async_copy16(tile + granule_offset<kStepGranules>(row, granule),
                 valid ? base + row * stride + at : base, valid);
  }
}

}  // namespace quantal::cuda

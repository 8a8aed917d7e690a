// Tiles of products on tensor cores: how operands lie in shared memory and how a warp reads them.
// Shared by the products of 16-bit floats and of int8.
//
// A tile is rows of granules of 16 bytes; granule g of row r stands at place g ^ (r & 7), so that
// the 8 rows of a matrix that one ldmatrix reads lie in different banks. A thread's rows differ by
// multiples of 8 and its granules by bits that it can flip, so an address in the tile is a sum that
// is made once and one exclusive or.
#pragma once

#include "kernels/cuda/device.h"

namespace quantal::cuda {

inline constexpr int kTileThreads = 256;  // 8 warps, 2 along rows of x, 4 along outputs
inline constexpr int kStepGranules = 8;   // depth of one step: 64 16-bit floats, 128 int8
inline constexpr int kStepBytes = kStepGranules * 16;
/// Products of 8 outputs that a warp has side by side in a tile of kTileWidth outputs.
template <int kTileWidth>
inline constexpr int kOutputTilesOf = kTileWidth / 4 / 8;

/// Byte offset of a granule in a tile whose rows have `kGranules` granules.
template <int kGranules>
QUANTAL_HD int granule_offset(int row, int granule) {
  return (row * kGranules + (granule ^ (row & 7))) * 16;
}

struct WarpPlace {
  int lane, row, output;  // first row of x and first output of the warp in the tile
};
template <int kTileRows, int kTileWidth>
QUANTAL_DEVICE WarpPlace warp_place() {
  const int warp = thread_index() / kWarp;
  return {thread_index() % kWarp, warp / 4 * (kTileRows / 2), warp % 4 * (kTileWidth / 4)};
}

/// What a lane names to ldmatrix: byte `base` and, by exclusive or, `place` in the tile.
struct Fragment {
  int base, place;
};
template <int kGranules>
QUANTAL_DEVICE Fragment fragment(int row, int granule) {
  return {row * kGranules * 16, (granule ^ (row & 7)) * 16};
}

/// The 16 x 32-byte operand of rows [row, row + 16) of x at step granules 2 k, 2 k + 1.
QUANTAL_DEVICE Fragment left_fragment(const WarpPlace& at) {
  return fragment<kStepGranules>(at.row + at.lane % 16, at.lane / 16);
}
QUANTAL_DEVICE void load_left(const unsigned char* tile, const Fragment& f, int row, int k,
                              std::uint32_t out[4]) {
  load_matrices(out, tile + f.base + row * kStepBytes + (f.place ^ (k * 32)));
}
/// Two operands of 8 outputs each, from `output` of the warp's on: {b of the first 8, b of the next
/// 8}, from rows of outputs.
QUANTAL_DEVICE Fragment right_fragment(const WarpPlace& at) {
  return fragment<kStepGranules>(at.output + at.lane % 8 + at.lane / 16 * 8, at.lane / 8 % 2);
}
QUANTAL_DEVICE void load_right(const unsigned char* tile, const Fragment& f, int output, int k,
                               std::uint32_t out[4]) {
  load_matrices(out, tile + f.base + output * kStepBytes + (f.place ^ (k * 32)));
}
/// The same of 16-bit elements from rows along the depth, kTileWidth outputs each; `output` is 0 or
/// 16.
template <int kTileWidth>
QUANTAL_DEVICE Fragment right_transposed_fragment(const WarpPlace& at) {
  return fragment<kTileWidth / 8>(at.lane % 16, at.output / 8 + at.lane / 16);
}
template <int kTileWidth>
QUANTAL_DEVICE void load_right_transposed(const unsigned char* tile, const Fragment& f, int output,
                                          int k, std::uint32_t out[4]) {
  load_matrices_transposed(out, tile + f.base + k * 16 * kTileWidth * 2 + (f.place ^ (output * 2)));
}

/// The part of a thread in copying steps of rows from global memory: one granule of rows
/// thread / 8, thread / 8 + 32, ...
struct StepSource {
  const unsigned char* at;   // its granule of its first row in the first step
  std::int64_t stride;       // of its rows
  std::int64_t rows, bytes;  // that exist from there on
  int to;                    // where the granule stands in a tile
};
inline constexpr int kSourceRows = kTileThreads / kStepGranules;

/// Rows begin at base + r * stride; rows [0, rows) and their first `bytes` exist.
QUANTAL_DEVICE StepSource step_source(const unsigned char* base, std::int64_t stride,
                                      std::int64_t rows, std::int64_t bytes) {
  const int row = thread_index() / kStepGranules, granule = thread_index() % kStepGranules;
  return {base + row * stride + 16 * granule, kSourceRows * stride, rows - row,
          bytes - 16 * granule, granule_offset<kStepGranules>(row, granule)};
}

/// Starts to copy the step that begins at byte `from` of `kRows` rows; what does not exist becomes
/// zero.
template <int kRows>
QUANTAL_DEVICE void copy_step(unsigned char* tile, const StepSource& source, std::int64_t from) {
  const bool inside = from < source.bytes;
  const unsigned char* at = source.at + (inside ? from : 0);
  QUANTAL_UNROLL
  for (int i = 0; i < kRows / kSourceRows; ++i) {
    const bool valid = inside && i * kSourceRows < source.rows;
    async_copy16(tile + source.to + i * kSourceRows * kStepBytes, at, valid);
    if ((i + 1) * kSourceRows < source.rows) at += source.stride;
  }
}

}  // namespace quantal::cuda

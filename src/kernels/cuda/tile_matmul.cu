#include "kernels/cuda/launchers.h"
#include "kernels/cuda/tile_matmul_inl.h"

namespace quantal::cuda {
namespace {

template <FloatKind kKind, bool kTransposed, int kTileRows>
void start_tiles(const TileArgs& args, Stream stream) {
  start(kTransposed ? "tile_matmul (transposed)" : "tile_matmul",
        tile_matmul_kernel<kKind, kTransposed, kTileRows>,
        TileShape<kTileRows>::geometry(kTransposed ? args.w.cols : args.w.rows, args.inputs), args,
        stream);
}

/// Tiles of 128 rows of x need less decoding per product; few rows would leave them empty.
template <FloatKind kKind, bool kTransposed>
void start_tiles_of(const TileArgs& args, Stream stream) {
  if (args.inputs <= 64) {
    start_tiles<kKind, kTransposed, 64>(args, stream);
  } else {
    start_tiles<kKind, kTransposed, 128>(args, stream);
  }
}

template <FloatKind kKind>
void start_tiles_any(const TileArgs& args, bool transposed, Stream stream) {
  if (transposed) {
    start_tiles_of<kKind, true>(args, stream);
  } else {
    start_tiles_of<kKind, false>(args, stream);
  }
}

}  // namespace

void tile_matmul(const TileArgs& args, FloatKind kind, bool transposed, Stream stream) {
  if (args.inputs == 0 || args.w.rows == 0) return;
  if (kind == FloatKind::kF16) {
    start_tiles_any<FloatKind::kF16>(args, transposed, stream);
  } else {
    start_tiles_any<FloatKind::kBF16>(args, transposed, stream);
  }
}

}  // namespace quantal::cuda

#include "kernels/cuda/launchers.h"
#include "kernels/cuda/tile_matmul_inl.h"

namespace quantal::cuda {
namespace {

template <class Form, FloatKind kKind, bool kTransposed, int kTileRows, int kTileWidth>
void start_tiles_by(const TileArgs& args, Stream stream) {
  const std::int64_t width = kTransposed ? args.w.cols : args.w.rows;
  start(kTransposed ? "tile_matmul (transposed)" : "tile_matmul",
        tile_matmul_kernel<Form, kKind, kTransposed, kTileRows, kTileWidth>,
        TileShape<kTileRows, kTileWidth>::geometry(width, args.inputs), args, stream);
}

/// Forms of 4 bits have kernels of their own.
template <FloatKind kKind, bool kTransposed, int kTileRows, int kTileWidth>
void start_tiles(const TileArgs& args, Stream stream) {
  const DecodePath path = decode_path(args.w, kKind);
  const bool four = args.w.bits == 4;
  const auto by = [&]<class Form>(Form) {
    start_tiles_by<Form, kKind, kTransposed, kTileRows, kTileWidth>(args, stream);
  };
  if (path == DecodePath::kHalves) {
    return four ? by(TileForm<DecodePath::kHalves, 4>{}) : by(TileForm<DecodePath::kHalves, 0>{});
  }
  if (path == DecodePath::kScaled && four) return by(TileForm<DecodePath::kScaled, 4>{});
  by(TileForm<DecodePath::kGeneral, 0>{});
}

/// Multiprocessors of an A100 and an H100 are 108 and 132: fewer tiles leave some of them idle.
constexpr std::int64_t kEnoughTiles = 96;

/// Large tiles need less decoding and fewer reads of shared memory for a product; the largest that
/// are enough are taken, else the smallest. Reckoned, not measured. Sums do not depend on it.
template <FloatKind kKind, bool kTransposed>
void start_tiles_of(const TileArgs& args, Stream stream) {
  const std::int64_t width = kTransposed ? args.w.cols : args.w.rows;
  const auto enough = [&](std::int64_t rows, std::int64_t outputs) {
    return (args.inputs + rows - 1) / rows * ((width + outputs - 1) / outputs) >= kEnoughTiles;
  };
  if (args.inputs > 64 && enough(128, 128)) {
    start_tiles<kKind, kTransposed, 128, 128>(args, stream);
  } else if (enough(64, 128)) {
    start_tiles<kKind, kTransposed, 64, 128>(args, stream);
  } else {
    start_tiles<kKind, kTransposed, 64, 64>(args, stream);
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

#include "kernels/cuda/geometry.h"

#include <string>

#include "kernels/cuda/start.h"
#include "quantal/core.h"

namespace quantal::cuda {

void check_geometry(const char* name, const Geometry& g) {
  const bool blocks =
      g.blocks_x >= 1 && g.blocks_x <= kMaxBlocksX && g.blocks_y >= 1 && g.blocks_y <= kMaxBlocksY;
  if (!blocks) {
    fail(Errc::kShape, "cuda: blocks of " + std::string(name) + " are " +
                           std::to_string(g.blocks_x) + " x " + std::to_string(g.blocks_y) +
                           ", expected at least 1 x 1 and at most " + std::to_string(kMaxBlocksX) +
                           " x " + std::to_string(kMaxBlocksY));
  }
  if (g.shared_bytes > kMaxSharedBytes) {
    fail(Errc::kInternal, "cuda: shared memory of " + std::string(name) + " is " +
                              std::to_string(g.shared_bytes) + " bytes, expected at most " +
                              std::to_string(kMaxSharedBytes));
  }
}

}  // namespace quantal::cuda

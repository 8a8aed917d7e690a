#include "kernels/cuda/int8_inl.h"
#include "kernels/cuda/launchers.h"
#include "quantal/core.h"

namespace quantal::cuda {
namespace {

/// Offsets of the parts of a workspace, each at a multiple of 16 bytes.
struct Int8Parts {
  std::int64_t q = 0, scale = 0, sum = 0, marks = 0, outliers = 0, end = 0;
};
Int8Parts int8_parts(std::int64_t inputs, std::int64_t cols) {
  constexpr const char* kWhat = "cuda int8_matmul: workspace";
  const auto behind = [&](std::int64_t at, std::int64_t bytes) {
    return checked_add(at, ceil_div(bytes, 16) * 16, kWhat);
  };
  Int8Parts p;
  p.scale = behind(0, checked_mul(inputs, ceil_div(cols, 16) * 16, kWhat));
  p.sum = behind(p.scale, checked_mul(inputs, 4, kWhat));
  p.marks = behind(p.sum, checked_mul(inputs, 4, kWhat));
  p.outliers = behind(p.marks, cols);
  p.end = behind(p.outliers, checked_mul(cols + 1, 4, kWhat));
  return p;
}

}  // namespace

std::int64_t int8_workspace(std::int64_t inputs, std::int64_t cols) {
  return int8_parts(inputs, cols).end;
}

Int8Scratch int8_scratch(void* workspace, std::int64_t inputs, std::int64_t cols) {
  const Int8Parts p = int8_parts(inputs, cols);
  auto* base = static_cast<unsigned char*>(workspace);
  return {.q = reinterpret_cast<std::int8_t*>(base + p.q),
          .scale = reinterpret_cast<float*>(base + p.scale),
          .sum = reinterpret_cast<std::int32_t*>(base + p.sum),
          .marks = base + p.marks,
          .outliers = reinterpret_cast<std::int32_t*>(base + p.outliers)};
}

void int8_matmul(const Int8Args& args, Stream stream) {
  if (args.inputs == 0 || args.w.rows == 0) return;
  if (args.inputs > kMarkRows) {
    start("int8_clear", int8_clear, clear_geometry(args.w.cols), args, stream);
  }
  start("int8_mark", int8_mark, mark_geometry(args.w.cols, args.inputs), args, stream);
  start("int8_list", int8_list, list_geometry(), args, stream);
  start("int8_round", int8_round, round_geometry(args.inputs), args, stream);
  start("int8_matmul", int8_matmul_kernel, int8_geometry(args.w.rows, args.inputs), args, stream);
}

}  // namespace quantal::cuda

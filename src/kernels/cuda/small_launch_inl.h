// Chooses the kernel of small_matmul for a form; one translation unit per type of activations.
#pragma once

#include "kernels/cuda/launchers.h"
#include "kernels/cuda/small_matmul_inl.h"

namespace quantal::cuda {

/// More rows of x share the decoded weights of two row tiles, so that x is read half as often.
/// Chosen by counting bytes; not measured.
template <int kBits, Values kValues, FloatKind kKind>
void small_matmul_of(const SmallArgs& args, Stream stream) {
  if (args.inputs <= 8) {
    start("small_matmul (8 inputs)", small_matmul_kernel<kBits, kValues, kKind, 1, 1>,
          SmallShape<1, 1>::geometry(args.w.rows), args, stream);
  } else {
    start("small_matmul (16 inputs)", small_matmul_kernel<kBits, kValues, kKind, 2, 2>,
          SmallShape<2, 2>::geometry(args.w.rows), args, stream);
  }
}

template <FloatKind kKind>
void small_matmul_any(const SmallArgs& args, Stream stream) {
  if (args.inputs == 0 || args.w.rows == 0) return;
  switch (args.w.values) {
    case Values::kTable:
      return small_matmul_of<4, Values::kTable, kKind>(args, stream);
    case Values::kE4M3:
      return small_matmul_of<8, Values::kE4M3, kKind>(args, stream);
    case Values::kE5M2:
      return small_matmul_of<8, Values::kE5M2, kKind>(args, stream);
    case Values::kNumber:
      break;
  }
  with_width(args.w.bits, [&](auto bits) {
    small_matmul_of<decltype(bits)::value, Values::kNumber, kKind>(args, stream);
  });
}

}  // namespace quantal::cuda

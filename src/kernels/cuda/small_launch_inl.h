// Chooses the kernel of small_matmul for a form; one translation unit per type of activations.
#pragma once

#include "kernels/cuda/launchers.h"
#include "kernels/cuda/small_matmul_inl.h"

namespace quantal::cuda {

/// More rows of x share the decoded weights of two row tiles, so that x is read half as often.
/// Chosen by counting bytes; not measured.
template <int kBits, Values kValues, DecodePath kPath, FloatKind kKind>
void small_matmul_by(const SmallArgs& args, Stream stream) {
  if (args.inputs <= 8) {
    start("small_matmul (8 inputs)", small_matmul_kernel<kBits, kValues, kPath, kKind, 1, 1>,
          SmallShape<kBits, kValues, kPath, 1, 1>::geometry(args.w.rows), args, stream);
  } else if (args.inputs <= 16) {
    start("small_matmul (16 inputs)", small_matmul_kernel<kBits, kValues, kPath, kKind, 2, 2>,
          SmallShape<kBits, kValues, kPath, 2, 2>::geometry(args.w.rows), args, stream);
  } else {
    start("small_matmul (32 inputs)", small_matmul_kernel<kBits, kValues, kPath, kKind, 2, 4>,
          SmallShape<kBits, kValues, kPath, 2, 4>::geometry(args.w.rows), args, stream);
  }
}

template <int kBits, Values kValues, FloatKind kKind>
void small_matmul_of(const SmallArgs& args, Stream stream) {
  const DecodePath path = decode_path(args.w, kKind);
  if constexpr (kValues != Values::kNumber || kBits == 8) {
    if (path == DecodePath::kScaled) {
      return small_matmul_by<kBits, kValues, DecodePath::kScaled, kKind>(args, stream);
    }
  }
  if constexpr (kValues == Values::kNumber && kBits <= kMaxHalfBits) {
    if (path == DecodePath::kHalves) {
      return small_matmul_by<kBits, kValues, DecodePath::kHalves, kKind>(args, stream);
    }
  }
  small_matmul_by<kBits, kValues, DecodePath::kGeneral, kKind>(args, stream);
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

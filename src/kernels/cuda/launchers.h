// The launchers in C++, behind launch.h: checked arguments in, kernels enqueued. They throw
// CudaFailure and what check_geometry throws; nothing to do is no launch.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/quantizer.h"
#include "kernels/cuda/start.h"

namespace quantal::cuda {

void dequantize(const DequantizeArgs& args, Stream stream);
void row_square_sums(const NormArgs& args, Stream stream);

void small_matmul_f16(const SmallArgs& args, Stream stream);
void small_matmul_bf16(const SmallArgs& args, Stream stream);

void tile_matmul(const TileArgs& args, FloatKind kind, bool transposed, Stream stream);

/// Bytes of Int8Scratch, and its parts in a workspace of that size.
std::int64_t int8_workspace(std::int64_t inputs, std::int64_t cols);
Int8Scratch int8_scratch(void* workspace, std::int64_t inputs, std::int64_t cols);
void int8_matmul(const Int8Args& args, Stream stream);

/// Bytes of QuantizeScratch for a spec, and its parts in a workspace of that size.
std::int64_t quantize_workspace(const PackedSpec& spec);
QuantizeScratch quantize_scratch(void* workspace, const PackedSpec& spec);
void quantize(const QuantizeArgs& args, Stream stream);
/// Its parts for kFitTable, which leaves scales, and kFitSuper, which leaves all bytes.
void quantize_fit_table(const QuantizeArgs& args, Stream stream);
void quantize_super(const QuantizeArgs& args, Stream stream);

}  // namespace quantal::cuda

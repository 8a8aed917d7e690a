// Packed weights as torch tensors, and the differentiable product with them.
#pragma once

#include <torch/types.h>

#include "quantal/formats.h"
#include "quantal/kernels.h"

namespace quantal {

/// kF32 -> torch::kFloat and so on for the types that torch has. Throws Error{kDtype}.
torch::ScalarType to_torch(DType dtype);
/// The inverse of to_torch. Throws Error{kDtype}.
DType from_torch(torch::ScalarType type);

/// Views a contiguous CPU tensor as quantal's TensorView; `t` must outlive it.
/// Throws Error{kDevice} / Error{kShape}.
TensorView tensor_view(const torch::Tensor& t);

/// A packed matrix in three contiguous uint8 tensors of one device, sizes as layout_of(spec) says.
struct PackedTensors {
  PackedSpec spec;       ///< what the bytes mean
  torch::Tensor codes;   ///< [rows, code_bytes]
  torch::Tensor stats;   ///< [stat_rows, stat_bytes]
  torch::Tensor shared;  ///< [shared_bytes]

  bool defined() const { return codes.defined(); }  ///< whether there are tensors
  std::int64_t nbytes() const;                      ///< of the three tensors
  /// Throws Error{kShape} / Error{kDtype} if a tensor does not fit `spec`, Error{kDevice} if they
  /// are on different devices.
  void check() const;
  /// Borrowed; throws what check() throws, Error{kDevice} for tensors that are not on the CPU.
  PackedView view() const;
  /// On the CPU: the same tensors, or copies.
  PackedTensors cpu() const;
};

/// Zero codes and statistics for `spec`.
PackedTensors empty_packed(const PackedSpec& spec);
/// Copies the bytes of a packed matrix into tensors.
PackedTensors to_tensors(const PackedView& w);
/// Takes the bytes over without a copy.
PackedTensors to_tensors(PackedMatrix&& w);

/// Quantizes `weight` [..., cols] (f32, f16 or bf16) on torch's thread pool; bits as
/// Dialect::quantize. The tensors come on the weight's device, and on another one than the CPU have
/// the same bytes (docs/cuda.md). Throws what make_spec and Dialect::quantize throw.
PackedTensors quantize(const torch::Tensor& weight, const QuantizeOptions& options);

/// The same into a form that is known already: `weight` [..., spec.cols] of spec.rows rows. Throws
/// Error{kShape} for other sizes.
PackedTensors quantize(const torch::Tensor& weight, const PackedSpec& spec);

/// The exact values w(r, c), rounded to `dtype`, as a fresh [rows, cols] tensor.
torch::Tensor dequantize(const PackedTensors& w, torch::ScalarType dtype);

/// Sums of squares of the rows of w, [rows] of `dtype`: kDouble, or kFloat for devices without it.
torch::Tensor row_square_sums(const PackedTensors& w, torch::ScalarType dtype);

/// ||W - deq(W)||_F / ||W||_F in double, decoding a few rows at a time. 0 for an all-zero W.
double relative_error(const torch::Tensor& weight, const PackedTensors& w);

/// `y[..., n] = sum_k x[..., k] * w(n, k) (+ bias[n])`, in the dtype of x (f32, f16 or bf16).
///
/// x      [..., cols]; a non-contiguous one is copied. bias [rows] or undefined.
/// Differentiable, also twice, in x and in bias; keeps nothing for backward but the packed tensors.
/// Few rows of x run straight from the codes, more through decoded panels of at most 8 MiB: both
/// use the exact values, so they differ only by summation order. No full decoded copy ever exists.
/// On other devices: docs/cuda.md.
/// Throws Error{kShape}, Error{kDtype}, Error{kDevice}.
///
/// The gradient is attached here, in C++, not to the dispatcher op quantal::linear. The Python
/// package registers its own for that op; one process uses either this function or the Python
/// package, not both.
torch::Tensor linear(const torch::Tensor& x, const PackedTensors& w,
                     const torch::Tensor& bias = {});

/// The product of LLM.int8 with a row-scaled 8-bit weight of bitsandbytes: entries of x are rounded
/// to int8 by row, those of at least `threshold` (6 upstream; 0 = none) go through dequantized
/// weights instead (matmul_int8 in kernels.h).
///
/// x, bias and errors as for linear(); Error{kUnsupported} for another form of w. The gradient
/// passes the rounding straight through: `dx = dy W` with the dequantized W, exact for the outlier
/// columns and bitsandbytes' choice for the others; differentiable twice.
torch::Tensor linear_int8(const torch::Tensor& x, const PackedTensors& w,
                          const torch::Tensor& bias = {}, double threshold = 6.0);

/// linear() with activations rounded to int8 in runs of columns (matmul_int8_activations in
/// kernels.h, with its bound). The gradient is that of linear(): the rounding is passed straight
/// through. Error{kUnsupported} for forms that int8_activations_refusal names.
torch::Tensor linear_int8_activations(const torch::Tensor& x, const PackedTensors& w,
                                      const torch::Tensor& bias = {});

}  // namespace quantal

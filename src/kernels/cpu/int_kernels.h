// Products of activations in int8 with packed codes (quantal/kernels.h, matmul_int8_activations)
// across the line between the dispatcher and the files of one instruction set. Only <cstdint> may
// be included here.
//
// Every set computes, for each output, in this order and in float32 with fma:
//
//   sum = 0
//   for each run r of columns:
//     dot = start[m, r] + sum over k in r of q[m, k] * u(n, k)                       int32, exact
//     sum = fma(A(n, r) * scale[m, r], float(dot), sum)
//     sum = fma(B(n, r), total[m, r], sum)                        forms with a stored offset only
//   y = sum + bias[n]
//
// so that all sets give the same bits, whatever the number of threads and of inputs.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"

namespace quantal {

inline constexpr std::int64_t kIntPanelColumns = 512;  ///< columns unpacked at a time
inline constexpr std::int64_t kMaxIntRun = 128;
inline constexpr std::int64_t kMaxIntInputs = 512;
inline constexpr float kMaxIntLevel = 127.0F;  ///< of activations
/// Where no |x| of a run reaches this, the run is zero: 127 / max |x| would overflow below 2^-121.
inline constexpr float kTinyRun = 0x1p-120F;
inline constexpr std::int64_t kIntRowUnit = 32;  ///< a multiple of the weight rows of every panel

/// How the codes of a matrix enter integer products: w(n, k) = unit * s * (u - centre), plus what
/// the offset adds. u is the code, or for tables levels[code].
struct IntForm {
  std::int64_t run;  ///< columns that share a scale of activations: 16, 32, 64 or 128
  std::int32_t centre;
  float unit;
  bool table;
  std::uint8_t levels[16];

  /// True if u may exceed 127: sets without an unsigned product store u - 128 in its place.
  bool wide(int bits) const { return table || bits == 8; }
};

/// One row of activations in runs of IntForm::run columns. Rows stand in tiles of `tile` rows whose
/// elements alternate, so element i is at [i * tile].
struct IntRow {
  std::int64_t tile;
  std::int32_t* q;      ///< x = scale * q, four columns an element; zero up to a multiple of 16
  float* scale;         ///< of a run: max |x| / 127; NaN if an x is not finite, 0 below 2^-120
  float* total;         ///< of a run: scale * (sum of q)
  std::int32_t* start;  ///< of a run: -centre * (sum of q)
};

/// Output rows of `inputs` <= kMaxIntInputs rows of activations, which stand in tiles of `x.tile`
/// rows, the last one smaller; x points to the first row.
struct IntJob {
  const IntForm* form;
  IntRow x;
  std::int64_t ldq, ldr;  ///< elements of a row, of q and of its runs
  std::int64_t inputs;
  const float* bias;
  FloatKind y_kind;
  void* y;
  std::int64_t ldy;
  void* scratch;  ///< the calling thread's own, kIntScratchBytes, whole cache lines
};

/// What one instruction set brings.
struct IntKernels {
  /// A tile, out.tile rows of `cols` activations: in each run q = rint(x * (127 / max |x|)), or 0
  /// if an x is not finite.
  void (*quantize)(const IntForm& form, FloatKind kind, const void* x, std::int64_t cols,
                   const IntRow& out) noexcept;
  /// Output rows [row_begin, row_end); row_begin is a multiple of kIntRowUnit.
  void (*matmul)(const KernelMatrix& w, const IntJob& job, std::int64_t row_begin,
                 std::int64_t row_end) noexcept;
  bool signed_codes;  ///< wide codes are stored as u - 128
  std::int64_t tile;  ///< most rows of activations in a tile
};

/// Bytes of IntJob::scratch: sums of all inputs, a panel of codes, statistics of its rows.
inline constexpr std::int64_t kIntScratchBytes = 192 * 1024;

const IntKernels& int_kernels_scalar();
const IntKernels& int_kernels_avx2();
const IntKernels& int_kernels_avxvnni();
const IntKernels& int_kernels_avx512();
const IntKernels& int_kernels_avx512vnni();
const IntKernels& int_kernels_neon();
const IntKernels& int_kernels_neondot();

}  // namespace quantal

// quantal kernels: arithmetic on packed matrices, and the instruction sets that it runs on.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"
#include "quantal/packed.h"

namespace quantal {

// ------------------------------------------------------------------ arithmetic

/// A rectangle of the matrix: rows [row_begin, row_end) x columns [col_begin, col_end).
struct Panel {
  std::int64_t row_begin = 0;  ///< first row
  std::int64_t row_end = 0;    ///< behind the last row
  std::int64_t col_begin = 0;  ///< first column
  std::int64_t col_end = 0;    ///< behind the last column
};
/// Panels begin at multiples of so many columns, a whole number of units of every width.
inline constexpr std::int64_t kColumnUnit = 128;

/// Exact values: `out[(r - row_begin) * ld + (c - col_begin)] = out_dtype(w(r, c))`, w as defined
/// at Offset. `ld` is in elements. col_begin must be a multiple of kColumnUnit. out_dtype kF32,
/// kF16 or kBF16. Bit-identical on every ISA and for every thread count. Throws Error{kShape} /
/// Error{kDtype}.
void dequantize(const PackedView& w, const Panel& panel, DType out_dtype, void* out,
                std::int64_t ld, const Executor& executor);

/// `||W - deq(W)||_F / ||W||_F` of evenly spaced rows, about 2^13 values in all: the error that
/// reports show. `weights` [rows, cols] of kF32, kF16 or kBF16; 0 where the sampled ones
/// are all zero. Throws Error{kDtype}.
double sampled_error(const PackedView& w, DType dtype, const void* weights);

/// True if the products run straight from packed codes (kRowRuns); otherwise use panels.
bool supports_packed_matmul(const PackedSpec& spec) noexcept;
/// Which of the two products: matmul or matmul_transposed.
enum class ProductKind { kForward, kBackward };
/// Rows of activations up to which the packed product beats panels, as measured for the active set.
std::int64_t packed_matmul_max_rows(const PackedSpec& spec, DType x_dtype,
                                    ProductKind product = ProductKind::kForward) noexcept;

/// `y[m, n] = sum_k x[m, k] * w(n, k) (+ bias[n])`, accumulated in float32 with a summation order
/// that depends on nothing but the shapes. x [m_rows, cols] and y [m_rows, rows] row-major and
/// contiguous, both of `dtype`; bias float32 of `rows` or null. |error| <= 8 * sqrt(cols) * 2^-24 *
/// sum|x||w| + rounding of y to dtype. For bfloat16 on "avx512bf16", w here is w(n, k) rounded to
/// bfloat16, as panels are, and subnormals count as zero; but with up to 64 rows of x, integers and
/// tables in whole groups of a multiple of 16 columns, scales and offsets are applied to sums over
/// a group, in float32: w = scale * level + offset with levels rounded to bfloat16 (integers are
/// exact) and without the roundings to value_dtype, |w| in the bound |scale * level| + |offset|,
/// and an infinite x may give NaN.
void matmul(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows, const float* bias,
            void* y, const Executor& executor);

/// `y[m, k] = sum_n g[m, n] * w(n, k)`, the product of the backward pass. g [m_rows, rows],
/// y [m_rows, cols]. Same contract as matmul.
void matmul_transposed(const PackedView& w, DType dtype, const void* g, std::int64_t m_rows,
                       void* y, const Executor& executor);

/// The product of LLM.int8 (Dettmers et al., 2022): activations to f16, entries with |a| >=
/// threshold (threshold > 0) are outliers and go through dequantized weights, the rest through int8
/// by row. w: 8 bits, kOver127, one group per row. Integers are exact; with threshold 0 the result
/// has the bits of bitsandbytes' portable kernel, its rounded constant included
/// (docs/formats/bnb.md).
void matmul_int8(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows,
                 const float* bias, float threshold, void* y, const Executor& executor);

/// How products take activations: as they are, or rounded by matmul_int8_activations.
enum class Activations { kExact, kInt8 };

/// Why `matmul_int8_activations` does not take this form, as "what is <actual>, expected
/// <allowed>"; empty if it does: integers of any width or tables of 16 values in groups along rows
/// that divide rows, each a multiple of 16 columns or the whole row.
std::string int8_activations_refusal(const PackedSpec& spec);

/// An approximation of matmul in integer products: activations are rounded to int8 in runs of
/// columns, in each to q = rint(x * 127 / max |x|), symmetric. A run is the largest power of two up
/// to 128 that divides a group; 128 columns where a group is the whole row.
///
/// `y[m, n] = sum over runs r of a(n, r) * scale[m, r] * sum_k q[m, k] (u(n, k) - centre)`
/// `          + b(n, r) * scale[m, r] * sum_k q[m, k]   (+ bias[n])`
///
/// in which w = a (u - centre) + b are the weights without the dialect's roundings to value_dtype;
/// levels u of a table that are no integers are rounded to 1/127 of the largest. Integer sums are
/// exact and each output is one chain of float32 fma in the order of runs, so all kernel sets,
/// numbers of threads and of rows give the same bits. Against the same sum over unrounded x:
/// |error| <= sum over runs of max |x| / 254 * sum_k |w(n, k)|, plus for tables max |level| / 254 *
/// |a| sum_k |x|, plus the roundings of w, of float32 and of y. Runs in which no |x| reaches 2^-120
/// count as zero; a row of x with an infinity or NaN gives NaN in all its outputs.
///
/// Buffers and dtypes as matmul. Throws Error{kUnsupported} with int8_activations_refusal.
void matmul_int8_activations(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows,
                             const float* bias, void* y, const Executor& executor);

// ------------------------------------------------------------------ dispatch

/// The kernel set in use: "scalar", "avx2", "avx512", "avx512bf16", "avx512amx" or "neon".
/// QUANTAL_CPU in the environment forces one; an unknown or unsupported value is Error{kDevice} on
/// first use.
std::string_view active_cpu_kernels();
/// All sets that this machine can run, best first.
std::vector<std::string_view> available_cpu_kernels();
/// Switches the process to a named set (tests, benchmarks). Throws Error{kDevice}.
void select_cpu_kernels(std::string_view name);

}  // namespace quantal

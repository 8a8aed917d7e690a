// Quanto: choosing codes, scales and shifts.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/fresh.h"
#include "formats/quanto/quanto_params.h"
#include "kernels/rounded.h"
#include "quantal/formats.h"

namespace quantal::quanto {

/// Dialect::make_spec. QuantizeOptions::mode holds words separated by commas: "max" (default) or
/// "hqq", "zeropoint", "exact_group". group_size counts only with "exact_group" (2 and 4 bits);
/// otherwise upstream's rule decides. axis -1 groups along columns, 0 and 1 along rows.
PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// Dialect::quantize: weights are rounded to spec.value_dtype first, as upstream's model.to()
/// would, then every operation is rounded to it. Bit-exact with optimum-quanto 0.2.7 on the CPU, up
/// to the sign of a zero shift or scale where a group holds both zeros (upstream's depends on the
/// width of its vectors); with the half-quadratic optimizer up to the order of summation of means.
void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

/// Dialect::quantize_part: the optimizer stops on the error of all rows, and a scale per tensor is
/// the largest of all rows.
void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const RowGather& gather,
                   const Executor& executor);

/// Parameters of all groups, numbers of value_dtype, in the order of the packed statistics.
/// `errors` holds the mean residual before and after each round of the optimizer that ran.
struct GroupParameters {
  FreshVector<float> scale, shift, zero;
  std::vector<float> errors;
};
/// How round `round` (0 .. kSolverRounds) of the optimizer shrinks residuals.
Shrink shrink_of(int round, DType value_dtype);
/// Half-quadratic optimizer on `p` (scale and shift of the max optimizer); replaces p.shift. The
/// error of a round is added in double by row (axis -1: by row block), then in order of rows;
/// `gather` (may be empty) brings rows that are not in `weights`.
void optimize_shifts(const PackedSpec& spec, WeightRun weights, GroupParameters& p,
                     const Executor& executor, const RowGather& gather = {});

}  // namespace quantal::quanto

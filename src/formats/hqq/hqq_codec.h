// HQQ: choosing codes, scales and zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/fresh.h"
#include "formats/hqq/hqq_params.h"
#include "kernels/quantize.h"
#include "quantal/formats.h"

namespace quantal::hqq {

/// Dialect::make_spec. group_size 0 means one group per row (axis 1) or column (axis 0); mode
/// "1.58" with bits 2 asks for ternary codes.
PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// Dialect::quantize. Without the solver bit-exact with hqq 0.2.8.post1 on the CPU; with it up to
/// the order of summation of the mean of a group and of the error.
void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

/// Dialect::quantize_part: the solver stops on the error of all rows. Not for quantized scales and
/// zeros.
void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const RowGather& gather,
                   const Executor& executor);

/// Scale (codes per weight unit) and zero (codes) of a group before the solver:
///   scale = min(recip(high - low) * max_code, 2e4), 1 where the range is at most 1e-4
///   zero = -low * scale, rounded to an integer with round_zero
struct InitialCode {
  float scale, zero;
};
InitialCode initial_code(float low, float high, float max_code, bool round_zero);

/// Parameters of all groups before they are rounded to value_dtype. `scale` is in codes per weight
/// unit (files hold its reciprocal), `zero` in codes. `errors` holds the mean residual of each
/// round of the solver that ran.
struct GroupParameters {
  FreshVector<float> scale, zero;
  std::vector<float> errors;
};
/// The error of a round is added in double: groups that begin in a row first, then rows in order;
/// `gather` (may be empty) brings rows that are not in `weights`. Throws Error{kUnsupported} for a
/// weight that is not finite.
GroupParameters solve(const PackedSpec& spec, WeightRun weights, const Executor& executor,
                      const RowGather& gather = {});

}  // namespace quantal::hqq

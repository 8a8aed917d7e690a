// What a packed matrix keeps of a change that was quantized into it. No torch here.
#pragma once

#include <cstdint>
#include <vector>

#include "quantal/kernels.h"

namespace quantal {

/// With D = target - w(before), the change that was asked for, and E = w(after) - w(before), the
/// change that happened:
struct Survival {
  std::int64_t codes_changed = 0;  ///< codes of `after` that differ from those of `before`
  double delta_norm = 0;           ///< ||D||_F
  double surviving = 1;            ///< <E, D> / <D, D>: 1 = all of it, 0 = lost to rounding
  double noise = 0;                ///< ||E - surviving D||_F / ||D||_F: what rounding added
};

/// `target` [rows, cols] float32, row-major. Sums in double, row by row: the same for any number of
/// threads. For D = 0: surviving 1, noise 0 or infinity. Throws Error{kShape} if the forms differ.
Survival measure_survival(const PackedView& before, const PackedView& after, const float* target,
                          const Executor& executor);

/// sum_c w(r, c)^2 of each row, in double.
std::vector<double> row_square_sums(const PackedView& w, const Executor& executor);

}  // namespace quantal

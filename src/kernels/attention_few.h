// Attention of few rows: what quantal/attention.h promises, cut into chunks of keys for the kernels
// of the active set.
#pragma once

#include <string>

#include "quantal/attention.h"

namespace quantal {

/// As attention_refusal, of the number of rows.
std::string few_rows_refusal(const AttentionShape& shape);

/// attention by the kernels of few rows, for checked arguments.
void attention_few_rows(const AttentionShape& shape, DType dtype, const AttentionInput& q,
                        const AttentionInput& k, const AttentionInput& v,
                        const AttentionOutput& out, float* lse, const Executor& executor);

}  // namespace quantal

// Which forms and sizes the launchers take. Each function says why not, as "what is <actual>,
// expected <allowed>"; empty where it does.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cuda/quantizer.h"
#include "quantal/packed.h"

namespace quantal::cuda {

/// Products straight from packed codes, for at most 16 rows of activations.
std::string small_refusal(const PackedSpec& spec, DType dtype, std::int64_t inputs);
/// Products over tiles of decoded weights.
std::string tile_refusal(const PackedSpec& spec, DType dtype, bool transposed);
/// LLM.int8.
std::string int8_refusal(const PackedSpec& spec, float threshold);
/// Quantizing.
std::string quantize_refusal(const PackedSpec& spec, const Quantizer& how);

}  // namespace quantal::cuda

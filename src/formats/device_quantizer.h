// Which encoder of a device makes the bytes of a dialect's quantizer.
#pragma once

#include <optional>

#include "kernels/cuda/quantizer.h"
#include "quantal/packed.h"

namespace quantal {

/// The encoder and its settings for a spec that the dialect's make_spec gave; nothing where only
/// the CPU's code makes them: HQQ's quantized parameters, Quanto's one scale for a matrix of
/// one column.
std::optional<cuda::Quantizer> device_quantizer(const PackedSpec& spec);

}  // namespace quantal

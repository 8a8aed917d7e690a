// The quant_state of a 4-bit layer: what its tensors do not say themselves.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/bnb/bnb_params.h"
#include "quantal/formats.h"

namespace quantal::bnb {

/// A layer's quant_state, checked: sizes >= 1, legal types, rows * cols without overflow.
struct State {
  std::string name;  ///< tensor that says so, for messages
  bool fp4 = false;
  bool nested = false;
  std::int64_t block_size = 0, nested_block_size = kNestedBlock;
  std::vector<std::int64_t> shape;  ///< of the dense weight, 1 to 8 dimensions
  std::int64_t rows = 0, cols = 0;  ///< product of all dimensions but the last; the last
  DType value_dtype = DType::kF32;
  float nested_offset = 0;
};

/// Name of the tensor with the JSON text, after `<module>.`.
std::string state_key(bool fp4);

/// True if the tensors of a module, by suffix, include a quant_state in either of its forms.
bool has_state(const std::function<bool(const std::string& suffix)>& has);

/// Reads either form: one uint8 tensor of JSON text (`weight.quant_state.bitsandbytes__nf4`), or
/// the individual entries of old torch files (`weight.quant_type`, `weight.blocksize`,
/// `weight.dtype`, `weight.shape`, `weight.nested_*`). Throws Error{kCorrupt} naming tensor and
/// member.
State read_state(const std::string& prefix, const TensorLookup& lookup);

/// The JSON text with upstream's members, order and separators. `nested_offset` only where nested.
std::string state_json(const PackedSpec& spec, const Flags& flags,
                       std::span<const std::int64_t> shape, std::optional<float> nested_offset);

}  // namespace quantal::bnb

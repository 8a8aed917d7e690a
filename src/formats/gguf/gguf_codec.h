// The gguf dialect's quantizer and file tensors.
#pragma once

#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal::gguf {

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options);

/// encode_ggml into the packed form, a few rows of blocks at a time.
void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor);

/// One tensor `<prefix>weight`, u8 [rows, bytes of a row]; ggml_type_of(w.spec) is its type.
std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix);

/// False: a tensor of blocks is known by its type in the file, not by the names of its neighbours.
bool recognizes(const std::function<bool(const std::string& suffix)>& has);
/// Throws Error{kUnsupported} naming pack_ggml, which takes the type.
StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts);

}  // namespace quantal::gguf

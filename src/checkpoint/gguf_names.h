// Names and row order of a llama model in GGUF files and in the Hugging Face world.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/io.h"

namespace quantal::checkpoint {

/// Frequency factors of the rotary embedding: folded into config.json, no tensor there.
inline constexpr std::string_view kRopeFactors = "rope_freqs.weight";

/// Hugging Face name of a GGUF tensor; empty if it is not one of a llama model.
std::string hf_name(std::string_view gguf);
/// Inverse of hf_name.
std::string gguf_name(std::string_view hf);

/// Names of the tensors that every llama model of `blocks` layers has, as GGUF spells them.
std::vector<std::string> required_gguf_names(std::int64_t blocks);

/// Heads whose rows a tensor of this Hugging Face name holds interleaved in a GGUF file: `heads`
/// for q_proj, `kv_heads` for k_proj, 0 for all others.
std::int64_t interleaved_heads(std::string_view hf, std::int64_t heads, std::int64_t kv_heads);

/// Row of the file that holds Hugging Face row `row`: within a head of D rows, HF row
/// s * D / 2 + p is stored as row 2 * p + s.
std::int64_t stored_row(std::int64_t row, std::int64_t rows_per_head);

/// A tensor of a GGUF file as readers see it. Where `heads` is not 0 the rows of each head stand
/// interleaved.
struct GgufEntry {
  std::string name;  ///< Hugging Face
  const GgufTensor* tensor = nullptr;
  std::int64_t heads = 0;
};
/// All tensors but the rotary factors, in file order. Throws Error{kUnsupported} for a tensor
/// without a counterpart, Error{kCorrupt} for rows that are no whole heads and for two tensors of
/// one name.
std::vector<GgufEntry> gguf_entries(const GgufFile& file);

}  // namespace quantal::checkpoint

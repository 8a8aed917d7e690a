// The kinds of ModelSource.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/locate.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

std::unique_ptr<ModelSource> open_gguf_source(const std::string& path);
std::unique_ptr<ModelSource> open_file_source(const Located& where);

/// Opens a GGUF file with the block sizes of formats/gguf.
GgufFile open_gguf(const std::string& path);

/// config.json of a llama-family GGUF. Throws Error{kUnsupported} for another architecture,
/// Error{kCorrupt} for missing, mistyped or contradicting keys.
std::string gguf_config_json(const GgufFile& file);
/// The tokenizer.ggml.* keys as JSON (see docs/formats/gguf.md), "{}" without a tokenizer.
std::string gguf_tokenizer_json(const GgufFile& file);

/// An integer key of a GGUF; the fallback if it is absent, Error{kCorrupt} if it is of another
/// type, negative or above 2^31 - 1.
std::int64_t gguf_integer(const GgufFile& file, const std::string& key, std::int64_t fallback);

/// Rows as read_rows counts them: product of all dimensions but the last; 1 for rank 0 and 1.
struct RowShape {
  std::int64_t rows = 1;
  std::int64_t columns = 1;
};
RowShape row_shape(std::span<const std::int64_t> shape);
/// Throws Error{kShape} for a range outside [0, rows] and Error{kDtype} for a dtype that weights
/// cannot have.
void check_row_range(const RowShape& shape, std::int64_t row_begin, std::int64_t row_end,
                     DType dtype, const ErrorSite& site);

}  // namespace quantal::checkpoint

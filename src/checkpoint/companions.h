// Files beside the weights of a folder that belong to the model, not to its quantization.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "quantal/formats.h"

namespace quantal::checkpoint {

/// True for files that say how weights are quantized ("quanto_qmap.json", "hqq_config.json" ...),
/// in any layout of any dialect.
bool is_quantization_file(const std::string& name);

/// (path, name) of the files of a folder that a converted model keeps: no weights, no config.json,
/// nothing of is_quantization_file. In order of name.
std::vector<std::pair<std::string, std::string>> companions_of(const std::string& folder);

/// Adds tokenizer files, as far as they are there.
void add_tokenizer_texts(const std::string& folder, SideTexts& texts);

/// The texts among `texts` that are written beside the weights: the tokenizer, in whatever form,
/// and generation settings.
SideTexts carried_texts(const SideTexts& texts);

}  // namespace quantal::checkpoint

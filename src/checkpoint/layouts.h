// The ways in which models lie on disk: choosing one for writing, recognizing one on reading.
#pragma once

#include <span>
#include <string>

#include "checkpoint/tensor_set.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

/// Layouts of models without quantized layers, the default first.
std::span<const FileLayout> dense_layouts();
/// Those of a dialect; dense ones for null.
std::span<const FileLayout> layouts_of(const Dialect* dialect);
/// "hqq guide", "dense transformers".
std::string full_name(const Dialect* dialect, const FileLayout& layout);

/// The layout that SaveOptions::layout names or, where it is empty, that fits the suffix of `path`.
/// Throws Error{kConfig} listing those that there are.
const FileLayout& choose_layout(const Dialect* dialect, const std::string& wanted,
                                const std::string& path);
/// The layout that a set most resembles: container, file name, tree, settings files and keys.
/// `layers` may be a sample.
const FileLayout& detect_layout(const Dialect* dialect, const TensorSet& set,
                                std::span<const LayerEntry> layers);

}  // namespace quantal::checkpoint

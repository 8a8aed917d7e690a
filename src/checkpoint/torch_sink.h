// Weights on their way into torch files.
#pragma once

#include <memory>

#include "checkpoint/sink.h"

namespace quantal::checkpoint {

/// Writes tensors at once and the tree of names at the end; flat trees in a folder can be sharded.
std::unique_ptr<TensorSink> open_torch_sink(const FileLayout& layout, const SinkTarget& target);

}  // namespace quantal::checkpoint

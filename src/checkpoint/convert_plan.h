// What becomes of every layer and tensor of a model.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/reader.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

enum class Action {
  kCopy,       ///< a dense tensor as it is
  kKeep,       ///< a layer of the target's dialect as it is
  kTranscode,  ///< a layer into another form
  kQuantize,   ///< a dense weight into a layer
  kDecode,     ///< a layer into a dense weight
};

struct Step {
  Action action = Action::kCopy;
  std::string name;    ///< module of a layer, name of a dense tensor
  std::string module;  ///< of the layer that comes out, if one does
  TranscodeTarget target;
  std::optional<PackedSpec> from, to;
  DType from_dtype = DType::kF32;   ///< of a dense source
  DType dense_dtype = DType::kF32;  ///< of a decoded layer
  ConvertReport::Layer report;
};

/// Steps in the order of names, layers first. Throws Error{kConfig} for settings that no layer can
/// have; Error{kUnsupported} under lossless_only naming the first layer that would lose.
std::vector<Step> plan_steps(const ModelReader& reader, const Dialect* target,
                             const ConvertOptions& options);

/// The same error with words before its message.
Error with_context(const std::string& words, const Error& error);

/// Null for "dense". Throws Error{kConfig} listing the dialects.
const Dialect* convert_target(const std::string& name);

/// The statement about decoding to `dtype`.
Preservation decode_preserves(const PackedSpec& from, DType dtype);

/// Nothing is lost: by copied codes, or for dense targets by equal values.
bool loses_nothing(const Preservation& kept, bool dense);

}  // namespace quantal::checkpoint

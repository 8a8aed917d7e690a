// Which file of a folder holds the weights.
#pragma once

#include <string>
#include <vector>

#include "quantal/formats.h"
#include "quantal/io.h"

namespace quantal::checkpoint {

/// A model on disk before it is opened.
struct Located {
  std::string path;     ///< as the caller gave it
  bool folder = false;  ///< `path` is a folder
  /// Name of the weights: "model.safetensors", "qmodel.pt" ...; for shards that of the unsharded
  /// file. Empty for a single file.
  std::string weights;
  std::string index;               ///< path of the index file of shards, or empty
  std::vector<std::string> files;  ///< full paths of weights; shards of an index are not listed
  Container container = Container::kSafetensors;
  std::vector<std::string> notes;  ///< other weights in the folder that were passed over
};

/// A file is taken by its content, a folder by the order of docs/checkpoints.md. Throws Error{kIo}
/// "No checkpoint found in ..." naming what was looked for; Error{kUnsupported} for a file of
/// another kind.
Located locate(const std::string& path);

/// A name that leads nowhere but into its own folder.
bool is_plain_name(const std::string& name);

/// True for names that hold weights or their index; a saved folder must not keep old ones.
bool is_weights_name(const std::string& name);

}  // namespace quantal::checkpoint

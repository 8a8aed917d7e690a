// All tensors of a folder or file of safetensors, by name.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "quantal/io.h"

namespace quantal::checkpoint {

struct TensorSet {
  std::map<std::string, TensorView> tensors;
  std::vector<std::shared_ptr<SafetensorsFile>> files;  ///< keep the views alive
  std::string config_json = "{}";                       ///< text of config.json, if any
  std::string path;
};

/// Opens one .safetensors file, or a folder with model.safetensors or
/// model.safetensors.index.json (tensors that the index does not name are left out). Throws
/// Error{kIo} "No checkpoint found in ..." naming what was looked for; Error{kCorrupt} for a lying
/// index.
TensorSet open_tensor_set(const std::string& path);

}  // namespace quantal::checkpoint

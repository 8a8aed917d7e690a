// The digest of a model whose layers are seen one at a time.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

/// SHA-256 over the sorted names, each with the SHA-256 of its content: layers (spec, codes, stats,
/// shared), then tensors (dtype, shape, bytes). The order of the calls does not matter.
class ModelDigest {
 public:
  void add_layer(const std::string& name, const PackedView& layer);
  void add_tensor(const std::string& name, const TensorView& tensor);
  std::string hex() const;

 private:
  std::map<std::string, std::string> layers_, tensors_;
};

}  // namespace quantal::checkpoint

// Adapters of one's own: by name, and in files.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "quantal/torch/adapter.h"

namespace quantal {

/// A checked adapter of a registered name. Throws Error{kUnsupported} listing the names there are.
std::unique_ptr<QuantizationAdapter> make_registered(const std::string& name, Backend backend,
                                                     const QuantizationConfig& config);

/// `config_json` with the entry that names `adapter`, or without any if it is not registered.
std::string with_adapter_entry(const std::string& config_json, const QuantizationAdapter& adapter);

/// Layers of a form of one's own that a file holds, made but not yet put into a model.
class CustomLayers {
 public:
  /// Finds the adapter that wrote `file`, else `reader` if it is one of one's own, and makes a
  /// layer for each dense Linear of `model` whose weight the file has in other tensors.
  CustomLayers(const Checkpoint& file, torch::nn::Module& model, QuantizationAdapter& reader,
               const std::string& path);
  /// Null if the layer is not of such a form.
  std::shared_ptr<QuantizedLayerImpl> find(const std::string& name) const;

 private:
  std::map<std::string, std::shared_ptr<QuantizedLayerImpl>> layers_;
};

}  // namespace quantal

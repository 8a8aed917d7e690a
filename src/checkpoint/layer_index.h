// Which tensors of a set are quantized layers, and of which dialect.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/tensor_set.h"
#include "checkpoint/weight_shapes.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

/// Finds the layers of a set once and imports them on request. Thread-safe after construction; the
/// set must outlive it.
class LayerIndex {
 public:
  /// Throws what Dialect::read_settings throws.
  LayerIndex(const TensorSet& set, const LoadOptions& options);

  struct Layer {
    const Dialect* dialect = nullptr;
    std::string settings = "{}";
    std::vector<std::string> tensors;  ///< full names, the dense bias not among them
  };
  const std::map<std::string, Layer>& layers() const { return layers_; }
  /// Names of tensors that belong to no layer; Python values are not tensors.
  const std::vector<std::string>& dense() const { return dense_; }
  const std::vector<std::string>& values() const { return values_; }
  /// Titles of dialects whose settings are there; an unknown quant_method of config.json in quotes.
  const std::string& promised() const { return promised_; }

  /// Calls body with the opened layer, whose tensors are held meanwhile. Throws Error{kCorrupt} /
  /// Error{kShape} naming missing, extra and misshapen tensors; what `body` throws.
  void with_layer(const std::string& name,
                  const std::function<void(const StoredLayer&)>& body) const;
  /// Equal keys: layers that differ in nothing but the values of their larger tensors, so that they
  /// have one spec unless it is StoredLayer::spec_from_values.
  std::string form_key(const std::string& name) const;

 private:
  void find_layers();
  Layer* owner_of(const std::string& name);
  void assign_tensors();
  std::vector<std::int64_t> weight_shape(const std::string& name) const;

  const TensorSet& set_;
  LoadOptions options_;
  WeightShapes shapes_;
  std::map<std::string, Layer> layers_;
  std::vector<std::string> dense_, values_;
  std::string promised_;
};

/// Throws `e` again with the path that a dialect cannot know, and the layer if it names no tensor.
[[noreturn]] void rethrow_with_path(const Error& e, const std::string& path,
                                    const std::string& layer = {});
/// The message of `e` without its site.
std::string message_of(const Error& e);

}  // namespace quantal::checkpoint

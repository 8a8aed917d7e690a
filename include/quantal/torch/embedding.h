// Embedding tables over torch::nn::Module that may be packed.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "quantal/torch/linear.h"

namespace quantal {

/// `y = W[ids]` with W dense or packed; files of MLX and GGUF keep embeddings packed.
///
/// Dense: parameter `weight` [rows, dim]. Packed: child `packed` and no `weight`; forward() decodes
/// the rows it needs. The names are those of torch::nn::Embedding while it is dense.
class EmbeddingImpl : public torch::nn::Module {
 public:
  /// Values are undefined until they are loaded.
  EmbeddingImpl(std::int64_t num_embeddings, std::int64_t embedding_dim,
                torch::ScalarType dtype = torch::kFloat);

  /// ids int64 [...] -> [..., dim] in dtype().
  torch::Tensor forward(const torch::Tensor& ids);
  /// `x W^T`: the head of a model whose embeddings are tied.
  torch::Tensor logits(const torch::Tensor& x);
  /// dtype of the rows: of the weight, or the compute_dtype of the packed form.
  torch::ScalarType dtype() const;

  bool is_quantized() const { return packed != nullptr; }  ///< whether the table is packed
  /// Exchanges the table for a packed one [num_embeddings, embedding_dim] without bias; the dense
  /// one is released. Throws Error{kShape}; Error{kUnsupported} for statistics that rows share.
  void set_quantized(QuantizedLinear table);
  /// Exchanges whatever is there for a dense table. Throws Error{kShape}.
  void set_dense(torch::Tensor new_weight);
  /// Prints sizes and form.
  void pretty_print(std::ostream& stream) const override;

  std::int64_t num_embeddings;                  ///< rows of the table
  std::int64_t embedding_dim;                   ///< columns of the table
  torch::Tensor weight;                         ///< undefined while packed
  std::shared_ptr<QuantizedLinearImpl> packed;  ///< null while it is dense
};
/// Holder of an EmbeddingImpl.
TORCH_MODULE(Embedding);

/// All quantal::Embedding of a model with their dotted names; one that is registered twice appears
/// once.
std::vector<std::pair<std::string, std::shared_ptr<EmbeddingImpl>>> named_embeddings(
    torch::nn::Module& model);

}  // namespace quantal

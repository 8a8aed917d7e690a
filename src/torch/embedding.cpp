#include "quantal/torch/embedding.h"

#include <torch/torch.h>

#include <ostream>
#include <set>

namespace quantal {
namespace {

void check_table(std::int64_t rows, std::int64_t cols, const EmbeddingImpl& table) {
  if (rows == table.num_embeddings && cols == table.embedding_dim) return;
  fail(Errc::kShape, "Embedding: table is [" + std::to_string(rows) + ", " + std::to_string(cols) +
                         "], expected [" + std::to_string(table.num_embeddings) + ", " +
                         std::to_string(table.embedding_dim) + "]");
}

/// Some rows of a packed matrix; each row has its own statistics.
PackedTensors rows_of(const PackedTensors& w, const torch::Tensor& rows) {
  PackedTensors out = w;
  out.spec.rows = rows.numel();
  out.codes = w.codes.index_select(0, rows);
  out.stats = w.stats.index_select(0, rows);
  return out;
}

}  // namespace

EmbeddingImpl::EmbeddingImpl(std::int64_t rows, std::int64_t dim, torch::ScalarType dtype)
    : torch::nn::Module("Embedding"), num_embeddings(rows), embedding_dim(dim) {
  weight =
      register_parameter("weight", torch::empty({rows, dim}, torch::TensorOptions().dtype(dtype)));
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& ids) {
  if (!packed) return torch::embedding(weight, ids);
  const torch::NoGradGuard no_grad;
  const PackedTensors rows = rows_of(packed->packed(), ids.reshape({-1}));
  std::vector<std::int64_t> shape = ids.sizes().vec();
  shape.push_back(embedding_dim);
  return dequantize(rows, to_torch(rows.spec.value_dtype)).to(packed->compute_dtype).reshape(shape);
}

torch::Tensor EmbeddingImpl::logits(const torch::Tensor& x) {
  return packed ? packed->forward(x) : torch::linear(x, weight);
}

torch::ScalarType EmbeddingImpl::dtype() const {
  return packed ? packed->compute_dtype : weight.scalar_type();
}

void EmbeddingImpl::set_quantized(QuantizedLinear table) {
  check_table(table->out_features(), table->in_features(), *this);
  if (table->spec().group_map != GroupMap::kRowRuns) {
    fail(Errc::kUnsupported,
         "Embedding: statistics are shared by rows, expected statistics by row");
  }
  if (weight.defined()) parameters_.erase("weight");
  weight.reset();
  if (packed) unregister_module("packed");
  packed = register_module("packed", table.ptr());
  packed->train(is_training());
}

void EmbeddingImpl::set_dense(torch::Tensor new_weight) {
  if (new_weight.dim() != 2) {
    fail(Errc::kShape, "Embedding: table has shape " + shape_string(new_weight.sizes().vec()) +
                           ", expected two dimensions");
  }
  check_table(new_weight.size(0), new_weight.size(1), *this);
  if (weight.defined()) parameters_.erase("weight");
  if (packed) unregister_module("packed");
  packed.reset();
  weight = register_parameter("weight", new_weight.detach(), new_weight.requires_grad());
}

void EmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "quantal::Embedding(num_embeddings=" << num_embeddings
         << ", embedding_dim=" << embedding_dim << (packed ? ", packed)" : ")");
}

std::vector<std::pair<std::string, std::shared_ptr<EmbeddingImpl>>> named_embeddings(
    torch::nn::Module& model) {
  std::vector<std::pair<std::string, std::shared_ptr<EmbeddingImpl>>> out;
  std::set<const EmbeddingImpl*> seen;
  for (const auto& item : model.named_modules()) {
    auto table = std::dynamic_pointer_cast<EmbeddingImpl>(item.value());
    if (table && seen.insert(table.get()).second) out.emplace_back(item.key(), table);
  }
  return out;
}

}  // namespace quantal

#include "checkpoint/sha256.h"
#include "quantal/checkpoint.h"

namespace quantal {
namespace {

using checkpoint::Sha256;

/// Length before content: no two different sequences of fields give the same bytes.
void hash_field(Sha256& hash, std::span<const std::uint8_t> bytes) {
  hash.update_u64(bytes.size());
  hash.update(bytes);
}

void hash_field(Sha256& hash, const std::string& text) {
  hash.update_u64(text.size());
  hash.update(text);
}

void hash_entries(Sha256& hash, const std::map<std::string, std::string>& entries) {
  hash.update_u64(entries.size());
  for (const auto& [name, content] : entries) {
    hash_field(hash, name);
    hash_field(hash, content);
  }
}

}  // namespace

void ModelDigest::add_layer(const std::string& name, const PackedView& layer) {
  Sha256 hash;
  for (const std::int64_t value : spec_to_ints(layer.spec)) {
    hash.update_u64(static_cast<std::uint64_t>(value));
  }
  hash_field(hash, layer.codes);
  hash_field(hash, layer.stats);
  hash_field(hash, layer.shared);
  layers_[name] = hash.hex();
}

void ModelDigest::add_tensor(const std::string& name, const TensorView& tensor) {
  Sha256 hash;
  hash.update_u64(static_cast<std::uint64_t>(tensor.dtype));
  hash.update_u64(tensor.shape.size());
  for (const std::int64_t dim : tensor.shape) hash.update_u64(static_cast<std::uint64_t>(dim));
  hash_field(hash, tensor.bytes);
  tensors_[name] = hash.hex();
}

std::string ModelDigest::hex() const {
  Sha256 hash;
  hash_entries(hash, layers_);
  hash_entries(hash, tensors_);
  return hash.hex();
}

std::string checkpoint_digest(const CheckpointView& view) {
  ModelDigest digest;
  for (const auto& [name, layer] : view.layers) digest.add_layer(name, layer);
  for (const auto& [name, tensor] : view.tensors) digest.add_tensor(name, tensor);
  return digest.hex();
}

}  // namespace quantal

#include <algorithm>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "checkpoint/sha256.h"
#include "quantal/checkpoint.h"

namespace quantal {
namespace {

using checkpoint::Json;
using checkpoint::Sha256;

constexpr int kFolderFormat = 1;

/// Length before content: no two different sequences of fields give the same bytes.
void hash_field(Sha256& hash, std::span<const std::uint8_t> bytes) {
  hash.update_u64(bytes.size());
  hash.update(bytes);
}

void hash_field(Sha256& hash, const std::string& text) {
  hash.update_u64(text.size());
  hash.update(text);
}

/// Elements in order of name.
template <class List>
std::vector<const typename List::value_type*> by_name(const List& list) {
  std::vector<const typename List::value_type*> order;
  for (const auto& element : list) order.push_back(&element);
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->first < b->first; });
  return order;
}

std::string config_text(const CheckpointView& view) {
  Json config = checkpoint::parse_json_object(view.config_json, "config.json");
  config.erase("quantization_config");
  if (!view.quantization_config_json.empty()) {
    config["quantization_config"] =
        checkpoint::parse_json_object(view.quantization_config_json, "quantization_config");
  }
  return checkpoint::dump_json(config) + "\n";
}

void write_text(const std::string& path, const std::string& text) {
  write_file_atomic(path, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

/// Upstream's tensors of all layers, and the dense ones beside them.
struct Outgoing {
  std::vector<NamedTensor> exported;
  std::vector<std::pair<std::string, TensorView>> views;
};

Outgoing collect(const CheckpointView& view) {
  Outgoing out;
  for (const auto& [name, layer] : view.layers) {
    const Dialect& dialect = dialect_by_id(layer.spec.dialect);
    for (NamedTensor& tensor : dialect.export_layer(layer, name.empty() ? "" : name + ".")) {
      out.exported.push_back(std::move(tensor));
    }
  }
  for (const NamedTensor& tensor : out.exported) {
    out.views.emplace_back(tensor.name, tensor.tensor.view());
  }
  out.views.insert(out.views.end(), view.tensors.begin(), view.tensors.end());
  return out;
}

}  // namespace

void save_checkpoint(const std::string& folder, const CheckpointView& view, bool overwrite) {
  if (!view.layers.empty() && view.quantization_config_json.empty()) {
    fail(Errc::kConfig,
         "checkpoint: quantization_config is empty, expected the dialect's: other programs could "
         "not "
         "load the folder",
         {.path = folder});
  }
  const std::string config = config_text(view);
  checkpoint::AtomicFolder out(folder, overwrite);
  const Outgoing tensors = collect(view);
  write_safetensors(out.path("model.safetensors"), tensors.views, {{"format", "pt"}});
  write_text(out.path("config.json"), config);
  Json marker;
  marker["folder_format"] = kFolderFormat;
  marker["digest"] = checkpoint_digest(view);
  marker["layers"] = view.layers.size();
  marker["tensors"] = view.tensors.size();
  write_text(out.path(checkpoint::kMarker), checkpoint::dump_json(marker) + "\n");
  out.commit();
}

std::string checkpoint_digest(const CheckpointView& view) {
  Sha256 hash;
  hash.update_u64(view.layers.size());
  for (const auto* layer : by_name(view.layers)) {
    hash_field(hash, layer->first);
    for (const std::int64_t value : spec_to_ints(layer->second.spec)) {
      hash.update_u64(static_cast<std::uint64_t>(value));
    }
    hash_field(hash, layer->second.codes);
    hash_field(hash, layer->second.stats);
    hash_field(hash, layer->second.shared);
  }
  hash.update_u64(view.tensors.size());
  for (const auto* tensor : by_name(view.tensors)) {
    hash_field(hash, tensor->first);
    hash.update_u64(static_cast<std::uint64_t>(tensor->second.dtype));
    hash.update_u64(tensor->second.shape.size());
    for (const std::int64_t dim : tensor->second.shape) {
      hash.update_u64(static_cast<std::uint64_t>(dim));
    }
    hash_field(hash, tensor->second.bytes);
  }
  return hash.hex();
}

}  // namespace quantal

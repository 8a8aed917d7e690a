// Reader of safetensors, torch and npz files.
#include <algorithm>
#include <map>
#include <mutex>

#include "checkpoint/folder.h"
#include "checkpoint/layer_index.h"
#include "checkpoint/layouts.h"
#include "checkpoint/reader.h"

namespace quantal::checkpoint {
namespace {

/// Element types that dense models do not have but packed ones do.
bool looks_packed(const StoredTensor& tensor) {
  switch (tensor.dtype) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
    case DType::kF64:
    case DType::kI64:
    case DType::kBool:
      return false;
    default:
      return tensor.shape.size() >= 2;
  }
}

class FileReader final : public ModelReader {
 public:
  FileReader(TensorSet set, const LoadOptions& options)
      : set_(std::move(set)), index_(set_, options) {
    for (const auto& [name, layer] : index_.layers()) layers_.push_back(name);
    for (const std::string& name : index_.values()) {
      set_.notes.push_back("ignored a value that belongs to no layer: " + name);
    }
    find_unread();
  }

  const std::string& config_json() const override { return set_.config_json(); }
  const SideTexts& texts() const override { return set_.texts; }
  const std::vector<std::string>& layer_names() const override { return layers_; }
  const std::vector<std::string>& tensor_names() const override { return index_.dense(); }
  const std::string& folder() const override { return set_.where.folder ? set_.path() : none_; }
  const std::string& container() const override { return set_.description; }
  const std::vector<std::string>& notes() const override { return set_.notes; }
  const std::string& unread() const override { return unread_; }

  const std::string& layout() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!layout_.empty()) return layout_;
    if (layers_.empty()) {
      layout_ = full_name(nullptr, detect_layout(nullptr, set_, {}));
    } else {
      const Dialect* dialect = index_.layers().begin()->second.dialect;
      LayerEntry first{layers_.front(), {}};
      index_.with_layer(first.name, [&](const StoredLayer& layer) { first.spec = layer.spec; });
      layout_ = full_name(dialect, detect_layout(dialect, set_, {&first, 1}));
    }
    return layout_;
  }

  PackedMatrix read_layer(const std::string& name) const override {
    PackedMatrix out;
    index_.with_layer(name, [&](const StoredLayer& layer) { out = quantal::read_layer(layer); });
    return out;
  }

  PackedRows read_layer_rows(const std::string& name, RowRange rows,
                             RowRange stat_rows) const override {
    PackedRows out;
    index_.with_layer(name, [&](const StoredLayer& layer) {
      out = quantal::read_layer_rows(layer, rows, stat_rows);
    });
    return out;
  }

  PackedSpec layer_spec(const std::string& name) const override {
    const std::string key = index_.form_key(name);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = specs_.find(key);
    if (found != specs_.end()) return found->second;
    PackedSpec spec;
    index_.with_layer(name, [&](const StoredLayer& layer) {
      spec = layer.spec;
      if (!layer.spec_from_values) specs_.emplace(key, spec);
    });
    return spec;
  }

  std::int64_t layer_bytes(const std::string& name) const override {
    std::int64_t bytes = 0;
    for (const std::string& tensor : index_.layers().at(name).tensors) {
      bytes += set_.tensors.at(tensor).bytes();
    }
    return bytes;
  }

  TensorView describe_tensor(const std::string& name) const override {
    const StoredTensor& tensor = find(name);
    return {tensor.dtype, tensor.shape, {}};
  }

  HeldTensor lend_tensor(const std::string& name) const override { return find(name).read(); }

  Tensor read_tensor(const std::string& name) const override {
    const HeldTensor held = find(name).read();
    return {held.view.dtype, held.view.shape, {held.view.bytes.begin(), held.view.bytes.end()}};
  }

  std::vector<std::pair<std::string, std::string>> metadata() const override {
    std::vector<std::pair<std::string, std::string>> out;
    for (const auto& [key, value] : set_.metadata) {
      if (key != kEmbeddedTexts) out.emplace_back("metadata " + key, value);
    }
    return out;
  }

 private:
  const StoredTensor& find(const std::string& name) const {
    const auto found = set_.tensors.find(name);
    if (found == set_.tensors.end()) {
      fail(Errc::kConfig, "checkpoint: no tensor of this name",
           {.path = set_.path(), .tensor = name});
    }
    return found->second;
  }

  /// A model that promises quantized layers but where no dialect finds one is not dense: its packed
  /// tensors would pass as weights.
  void find_unread() {
    if (!layers_.empty() || index_.promised().empty()) return;
    const auto packed = std::find_if(set_.tensors.begin(), set_.tensors.end(),
                                     [](const auto& one) { return looks_packed(one.second); });
    if (packed == set_.tensors.end()) {
      set_.notes.push_back("settings of " + index_.promised() +
                           " are there, but every tensor is dense");
      return;
    }
    std::string known;
    for (const Dialect* dialect : dialects()) {
      known += (known.empty() ? "" : ", ") + std::string(dialect->title);
    }
    unread_ = "checkpoint: quantization method is " + index_.promised() +
              ", but no layer is stored in a way that is read here (" + known +
              "); first packed tensor: " + packed->first;
  }

  TensorSet set_;
  LayerIndex index_;
  std::vector<std::string> layers_;
  std::string unread_, none_;
  mutable std::mutex mutex_;
  mutable std::string layout_;
  mutable std::map<std::string, PackedSpec> specs_;
};

}  // namespace

std::unique_ptr<ModelReader> open_file_reader(const Located& where, const LoadOptions& options) {
  return std::make_unique<FileReader>(open_tensor_set(where), options);
}

}  // namespace quantal::checkpoint

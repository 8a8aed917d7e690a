// GGUF files as packed layers and dense tensors.
#include <algorithm>
#include <cstring>
#include <map>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_names.h"
#include "checkpoint/layer_index.h"
#include "checkpoint/layouts.h"
#include "checkpoint/sources.h"

namespace quantal::checkpoint {
namespace {

GgmlType type_of(const GgufTensor& tensor) { return static_cast<GgmlType>(tensor.type); }

/// dtype of a tensor that stays dense.
DType dense_dtype(const GgufTensor& tensor) {
  switch (type_of(tensor)) {
    case GgmlType::kF16:
      return DType::kF16;
    case GgmlType::kBF16:
      return DType::kBF16;
    default:
      return DType::kF32;
  }
}

bool is_plain(const GgufTensor& tensor) {
  const GgmlType type = type_of(tensor);
  return type == GgmlType::kF32 || type == GgmlType::kF16 || type == GgmlType::kBF16;
}

/// Some rows of blocks in Hugging Face order.
std::vector<std::uint8_t> ordered_rows(const GgufEntry& entry, std::int64_t all, RowRange rows) {
  const auto bytes = entry.tensor->bytes;
  const auto row_bytes = static_cast<std::int64_t>(bytes.size()) / all;
  std::vector<std::uint8_t> out(static_cast<std::size_t>(rows.size() * row_bytes));
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    std::memcpy(out.data() + (r - rows.begin) * row_bytes,
                bytes.data() + stored_row(r, all / entry.heads) * row_bytes,
                static_cast<std::size_t>(row_bytes));
  }
  return out;
}

class GgufReader final : public ModelReader {
 public:
  GgufReader(const std::string& path, const LoadOptions& options)
      : file_(std::make_shared<GgufFile>(open_gguf(path))),
        executor_(options.executor == nullptr ? serial_executor() : *options.executor),
        config_(gguf_config_json(*file_)),
        container_("GGUF version " + std::to_string(file_->version())) {
    const Dialect& dialect = dialect_by_name("gguf");
    for (GgufEntry& entry : gguf_entries(*file_)) add(std::move(entry));
    std::sort(layers_.begin(), layers_.end());
    std::sort(dense_.begin(), dense_.end());
    layout_ = layers_.empty() ? "dense gguf" : full_name(&dialect, dialect.layouts.front());
    std::vector<GgufPair> kept;
    for (GgufPair& pair : file_->pairs()) {
      if (pair.key.starts_with("general.") || pair.key.starts_with("tokenizer.")) {
        kept.push_back(std::move(pair));
      }
    }
    texts_[kTokenizerGguf] = gguf_metadata_bytes(kept);
  }

  const std::string& config_json() const override { return config_; }
  const std::string& layout() const override { return layout_; }
  const SideTexts& texts() const override { return texts_; }
  const std::vector<std::string>& layer_names() const override { return layers_; }
  const std::vector<std::string>& tensor_names() const override { return dense_; }
  const std::string& folder() const override { return none_; }
  const std::string& container() const override { return container_; }
  const std::vector<std::string>& notes() const override { return notes_; }
  const std::string& unread() const override { return none_; }

  PackedSpec layer_spec(const std::string& name) const override {
    const GgufTensor& tensor = *find(name + ".weight").tensor;
    return ggml_spec(type_of(tensor), tensor.shape[0], tensor.shape[1]);
  }

  std::int64_t layer_bytes(const std::string& name) const override {
    return static_cast<std::int64_t>(find(name + ".weight").tensor->bytes.size());
  }

  PackedMatrix read_layer(const std::string& name) const override {
    return rows_of(name, {0, find(name + ".weight").tensor->shape[0]});
  }

  PackedRows read_layer_rows(const std::string& name, RowRange rows,
                             RowRange stat_rows) const override {
    try {
      check_layer_rows(layer_spec(name), rows, stat_rows);
    } catch (const Error& e) {
      rethrow_with_path(e, file_->path(), name);
    }
    PackedMatrix part = rows_of(name, rows);
    if (stat_rows != rows) part.stats = rows_of(name, stat_rows).stats;
    return {std::move(part.codes), std::move(part.stats), std::move(part.shared)};
  }

  TensorView describe_tensor(const std::string& name) const override {
    const GgufTensor& tensor = *find(name).tensor;
    return {dense_dtype(tensor), tensor.shape, {}};
  }

  HeldTensor lend_tensor(const std::string& name) const override {
    const GgufEntry& entry = find(name);
    const GgufTensor& tensor = *entry.tensor;
    const DType dtype = dense_dtype(tensor);
    const bool aligned =
        reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % dtype_size(dtype) == 0;
    if (is_plain(tensor) && entry.heads == 0 && aligned) {
      return {{dtype, tensor.shape, tensor.bytes}, file_};
    }
    auto owned = std::make_shared<Tensor>(read_tensor(name));
    return {owned->view(), owned};
  }

  Tensor read_tensor(const std::string& name) const override {
    const GgufEntry& entry = find(name);
    const GgufTensor& tensor = *entry.tensor;
    Tensor out = make_tensor(dense_dtype(tensor), tensor.shape);
    if (entry.heads != 0) {
      // A bias is permuted as rows of one element.
      const std::int64_t rows =
          tensor.shape.size() == 1 ? tensor.shape[0] : row_shape(tensor.shape).rows;
      decode(tensor, ordered_rows(entry, rows, {0, rows}), out);
    } else {
      decode(tensor, tensor.bytes, out);
    }
    return out;
  }

  std::vector<std::pair<std::string, std::string>> metadata() const override {
    return {{"version", std::to_string(file_->version())}};
  }

 private:
  void add(GgufEntry entry) {
    const GgufTensor& tensor = *entry.tensor;
    const ErrorSite site{
        .path = file_->path(), .tensor = tensor.name, .offset = tensor.file_offset};
    const GgmlBlock& block = ggml_block(type_of(tensor));
    if (!block.decodable) {
      fail(Errc::kUnsupported,
           "gguf: stored type is " + std::string(block.name) + ", which quantal does not decode",
           site);
    }
    constexpr std::string_view kWeight = ".weight";
    const bool weight = entry.name.ends_with(kWeight);
    if (weight && tensor.shape.size() == 2 && ggml_packable(block.type)) {
      layers_.push_back(entry.name.substr(0, entry.name.size() - kWeight.size()));
    } else if (entry.heads != 0 && tensor.shape.size() == 1 && !is_plain(tensor)) {
      fail(Errc::kUnsupported,
           "gguf: a permuted bias is stored as " + std::string(block.name) +
               ", expected F32, F16 or BF16",
           site);
    } else {
      dense_.push_back(entry.name);
    }
    std::string name = entry.name;
    entries_.emplace(std::move(name), std::move(entry));
  }

  /// Rows of a layer; blocks lie within rows.
  PackedMatrix rows_of(const std::string& name, RowRange rows) const {
    const GgufEntry& entry = find(name + ".weight");
    const GgufTensor& tensor = *entry.tensor;
    const GgmlType type = type_of(tensor);
    const std::int64_t cols = tensor.shape[1];
    if (entry.heads != 0) {
      const auto blocks = ordered_rows(entry, tensor.shape[0], rows);
      return pack_ggml(type, rows.size(), cols, blocks, executor_);
    }
    const auto begin = static_cast<std::size_t>(ggml_bytes(type, rows.begin, cols));
    const auto bytes = static_cast<std::size_t>(ggml_bytes(type, rows.size(), cols));
    return pack_ggml(type, rows.size(), cols, tensor.bytes.subspan(begin, bytes), executor_);
  }

  const GgufEntry& find(const std::string& name) const {
    const auto found = entries_.find(name);
    if (found == entries_.end()) {
      fail(Errc::kConfig, "checkpoint: no tensor of this name",
           {.path = file_->path(), .tensor = name});
    }
    return found->second;
  }

  static void decode(const GgufTensor& tensor, std::span<const std::uint8_t> bytes, Tensor& out) {
    if (is_plain(tensor)) {
      if (!bytes.empty()) std::memcpy(out.bytes.data(), bytes.data(), bytes.size());
      return;
    }
    decode_ggml(type_of(tensor), bytes.data(), out.view().numel(),
                reinterpret_cast<float*>(out.bytes.data()));
  }

  std::shared_ptr<GgufFile> file_;
  const Executor& executor_;
  std::string config_, container_, layout_, none_;
  SideTexts texts_;
  std::map<std::string, GgufEntry> entries_;
  std::vector<std::string> layers_, dense_, notes_;
};

}  // namespace

std::unique_ptr<ModelReader> open_gguf_reader(const std::string& path, const LoadOptions& options) {
  return std::make_unique<GgufReader>(path, options);
}

}  // namespace quantal::checkpoint

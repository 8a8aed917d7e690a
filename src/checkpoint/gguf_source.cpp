// GGUF tensors under Hugging Face names, decoded.
#include <algorithm>
#include <map>

#include "checkpoint/gguf_names.h"
#include "checkpoint/sources.h"
#include "quantal/ggml.h"

namespace quantal::checkpoint {
namespace {

class GgufSource : public ModelSource {
 public:
  explicit GgufSource(const std::string& path)
      : file_(open_gguf(path)),
        config_(gguf_config_json(file_)),
        tokenizer_(gguf_tokenizer_json(file_)) {
    for (GgufEntry& entry : gguf_entries(file_)) {
      const GgufTensor& tensor = *entry.tensor;
      infos_.push_back({entry.name, tensor.shape, std::string(find_ggml_block(tensor.type)->name),
                        static_cast<std::int64_t>(tensor.bytes.size())});
      std::string name = entry.name;
      entries_.emplace(std::move(name), std::move(entry));
    }
  }

  std::string config_json() const override { return config_; }
  std::string tokenizer_json() const override { return tokenizer_; }
  const std::vector<Info>& tensors() const override { return infos_; }

  void read_rows(const std::string& name, std::int64_t row_begin, std::int64_t row_end, DType dtype,
                 void* out, const Executor& executor) const override {
    const auto found = entries_.find(name);
    const ErrorSite site{.path = file_.path(), .tensor = name};
    if (found == entries_.end()) fail(Errc::kConfig, "read_rows: no tensor of this name", site);
    const GgufEntry& entry = found->second;
    // A bias is one row to a reader, but its elements are permuted as rows of one element.
    const RowShape seen = row_shape(entry.tensor->shape);
    check_row_range(seen, row_begin, row_end, dtype, site);
    const bool bias = entry.heads != 0 && entry.tensor->shape.size() == 1;
    const RowShape shape = bias ? RowShape{seen.columns, 1} : seen;
    if (bias) row_begin = row_begin * shape.rows, row_end = row_end * shape.rows;
    check_decodable(entry, shape, site);
    executor.parallel_for(row_begin, row_end,
                          ceil_div(std::int64_t{1} << 16, std::max<std::int64_t>(shape.columns, 1)),
                          [&](std::int64_t begin, std::int64_t end) {
                            auto* target = static_cast<std::uint8_t*>(out) +
                                           (begin - row_begin) * shape.columns *
                                               static_cast<std::int64_t>(dtype_size(dtype));
                            decode(entry, shape, begin, end, dtype, target);
                          });
  }

 private:
  static void check_decodable(const GgufEntry& entry, const RowShape& shape,
                              const ErrorSite& site) {
    const GgmlBlock* block = find_ggml_block(entry.tensor->type);
    if (!block->decodable) {
      fail(Errc::kUnsupported,
           "read_rows: stored type is " + std::string(block->name) +
               ", which quantal does not decode",
           site);
    }
    if (shape.columns % block->elements != 0) {
      fail(Errc::kUnsupported,
           "read_rows: a permuted bias is stored as " + std::string(block->name) +
               ", expected F32, F16 or BF16",
           site);
    }
  }

  static void decode(const GgufEntry& entry, const RowShape& shape, std::int64_t begin,
                     std::int64_t end, DType dtype, std::uint8_t* out) {
    const GgmlBlock& block = *find_ggml_block(entry.tensor->type);
    const std::int64_t row_bytes = shape.columns / block.elements * block.bytes;
    const auto out_bytes = shape.columns * static_cast<std::int64_t>(dtype_size(dtype));
    const std::int64_t rows_per_head = entry.heads == 0 ? 0 : shape.rows / entry.heads;
    std::vector<float> wide(dtype == DType::kF32 ? 0 : static_cast<std::size_t>(shape.columns));
    for (std::int64_t row = begin; row < end; ++row, out += out_bytes) {
      const std::int64_t stored = entry.heads == 0 ? row : stored_row(row, rows_per_head);
      const std::uint8_t* data = entry.tensor->bytes.data() + stored * row_bytes;
      if (dtype == DType::kF32) {
        decode_ggml(block.type, data, shape.columns, reinterpret_cast<float*>(out));
      } else {
        decode_ggml(block.type, data, shape.columns, wide.data());
        narrow_from_f32(dtype, wide.data(), shape.columns, out);
      }
    }
  }

  GgufFile file_;
  std::string config_, tokenizer_;
  std::map<std::string, GgufEntry> entries_;
  std::vector<Info> infos_;
};

}  // namespace

GgufFile open_gguf(const std::string& path) {
  return GgufFile(path, [](std::uint32_t type) -> GgufBlockSize {
    const GgmlBlock* block = find_ggml_block(type);
    return block == nullptr ? GgufBlockSize{} : GgufBlockSize{block->elements, block->bytes};
  });
}

std::unique_ptr<ModelSource> open_gguf_source(const std::string& path) {
  return std::make_unique<GgufSource>(path);
}

}  // namespace quantal::checkpoint

// GGUF tensors under Hugging Face names. Source of the names and of the rotary row order:
// docs/formats/gguf.md, checked against transformers 4.57.6 bit for bit.
#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "checkpoint/sources.h"
#include "quantal/ggml.h"

namespace quantal::checkpoint {
namespace {

struct NamePair {
  std::string_view gguf, hf;
};

constexpr std::array<NamePair, 3> kModelNames = {{
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
}};

constexpr std::array<NamePair, 9> kLayerNames = {{
    {"attn_norm", "input_layernorm"},
    {"ffn_norm", "post_attention_layernorm"},
    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"},
    {"ffn_gate", "mlp.gate_proj"},
    {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
}};

/// Frequency factors of the rotary embedding: folded into config.json, no tensor there.
constexpr std::string_view kRopeFactors = "rope_freqs.weight";

/// A tensor as readers see it. Where `heads` is not 0 the rows of each head stand interleaved.
struct Entry {
  const GgufTensor* tensor = nullptr;
  std::int64_t heads = 0;
};

bool is_number(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// Hugging Face name; empty if the tensor is not one of a llama model.
std::string hf_name(std::string_view name) {
  for (const NamePair& pair : kModelNames) {
    if (name == pair.gguf) return std::string(pair.hf);
  }
  if (!name.starts_with("blk.")) return {};
  const std::size_t layer_end = name.find('.', 4);
  const std::size_t kind_end = name.rfind('.');
  if (layer_end == std::string_view::npos || kind_end <= layer_end) return {};
  const std::string_view layer = name.substr(4, layer_end - 4);
  const std::string_view kind = name.substr(layer_end + 1, kind_end - layer_end - 1);
  const std::string_view suffix = name.substr(kind_end);
  if (!is_number(layer) || (suffix != ".weight" && suffix != ".bias")) return {};
  for (const NamePair& pair : kLayerNames) {
    if (kind != pair.gguf) continue;
    return "model.layers." + std::string(layer) + "." + std::string(pair.hf) + std::string(suffix);
  }
  return {};
}

/// Row of the file that holds Hugging Face row `row`: within a head of D rows, HF row
/// s * D / 2 + p is stored as row 2 * p + s.
std::int64_t stored_row(std::int64_t row, std::int64_t rows_per_head) {
  const std::int64_t head = row / rows_per_head;
  const std::int64_t in_head = row % rows_per_head;
  const std::int64_t half = rows_per_head / 2;
  return head * rows_per_head + 2 * (in_head % half) + in_head / half;
}

class GgufSource : public ModelSource {
 public:
  explicit GgufSource(const std::string& path)
      : file_(open_gguf(path)),
        config_(gguf_config_json(file_)),
        tokenizer_(gguf_tokenizer_json(file_)) {
    const std::int64_t heads = gguf_integer(file_, "llama.attention.head_count", 0);
    const std::int64_t kv_heads = gguf_integer(file_, "llama.attention.head_count_kv", heads);
    for (const GgufTensor& tensor : file_.tensors()) {
      if (tensor.name == kRopeFactors) continue;
      add(tensor, heads, kv_heads);
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
    const Entry& entry = found->second;
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
  void add(const GgufTensor& tensor, std::int64_t heads, std::int64_t kv_heads) {
    const std::string name = hf_name(tensor.name);
    const ErrorSite site{.path = file_.path(), .tensor = tensor.name, .offset = tensor.file_offset};
    if (name.empty()) {
      fail(Errc::kUnsupported, "gguf: tensor has no counterpart in a llama model", site);
    }
    Entry entry{&tensor, 0};
    if (name.find(".q_proj.") != std::string::npos) entry.heads = heads;
    if (name.find(".k_proj.") != std::string::npos) entry.heads = kv_heads;
    if (entry.heads != 0) {
      const std::int64_t rows =
          tensor.shape.size() == 1 ? tensor.shape[0] : row_shape(tensor.shape).rows;
      if (rows % (2 * entry.heads) != 0 || rows == 0) {
        fail(Errc::kCorrupt,
             "gguf: rows are " + std::to_string(rows) + ", expected a multiple of 2 * " +
                 std::to_string(entry.heads) + " heads",
             site);
      }
    }
    if (!entries_.emplace(name, entry).second) {
      fail(Errc::kCorrupt, "gguf: two tensors are called " + name + " in Hugging Face names", site);
    }
    const GgmlBlock* block = find_ggml_block(tensor.type);
    infos_.push_back({name, tensor.shape, std::string(block->name),
                      static_cast<std::int64_t>(tensor.bytes.size())});
  }

  static void check_decodable(const Entry& entry, const RowShape& shape, const ErrorSite& site) {
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

  static void decode(const Entry& entry, const RowShape& shape, std::int64_t begin,
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
  std::map<std::string, Entry> entries_;
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

// A llama model into one GGUF file.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_names.h"

namespace quantal::checkpoint {
namespace {

constexpr std::uint64_t kQuantizationVersion = 2;

/// general.file_type of a model that is mostly of one type; for people only.
constexpr std::array<std::pair<GgmlType, std::uint64_t>, 14> kFileTypes = {{
    {GgmlType::kF32, 0},
    {GgmlType::kF16, 1},
    {GgmlType::kQ4_0, 2},
    {GgmlType::kQ4_1, 3},
    {GgmlType::kQ8_0, 7},
    {GgmlType::kQ5_0, 8},
    {GgmlType::kQ5_1, 9},
    {GgmlType::kQ2_K, 10},
    {GgmlType::kQ3_K, 11},
    {GgmlType::kQ4_K, 14},
    {GgmlType::kQ5_K, 16},
    {GgmlType::kQ6_K, 18},
    {GgmlType::kIQ4_NL, 25},
    {GgmlType::kBF16, 32},
}};

std::int64_t integer_of(const std::vector<GgufPair>& pairs, const std::string& key) {
  for (const GgufPair& pair : pairs) {
    if (pair.key == key) return static_cast<std::int64_t>(std::get<std::uint64_t>(pair.value));
  }
  fail(Errc::kInternal, "gguf: no pair " + key);
}

/// Writes the rows of a tensor, each head's rows in the order of the file.
void write_interleaved(GgufWriter& writer, std::span<const std::uint8_t> bytes, std::int64_t rows,
                       std::int64_t rows_per_head) {
  const std::int64_t row_bytes = static_cast<std::int64_t>(bytes.size()) / rows;
  std::vector<std::uint8_t> head(static_cast<std::size_t>(row_bytes * rows_per_head));
  for (std::int64_t first = 0; first < rows; first += rows_per_head) {
    for (std::int64_t r = 0; r < rows_per_head; ++r) {
      std::memcpy(head.data() + stored_row(r, rows_per_head) * row_bytes,
                  bytes.data() + (first + r) * row_bytes, static_cast<std::size_t>(row_bytes));
    }
    writer.write(head);
  }
}

void write_floats(GgufWriter& writer, std::span<const float> values) {
  std::vector<std::uint8_t> bytes(values.size() * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  writer.write(bytes);
}

}  // namespace

GgufModelWriter::GgufModelWriter(const std::string& path) : path_(path), spool_(path) {}

void GgufModelWriter::add(const std::string& name, GgmlType type,
                          const std::vector<std::int64_t>& shape,
                          std::span<const std::uint8_t> bytes) {
  Waiting waiting{name, gguf_name(name), type, shape, 0};
  const ErrorSite site{.path = path_, .tensor = name};
  if (waiting.gguf.empty()) {
    fail(Errc::kUnsupported, "gguf: tensor has no counterpart in a llama model", site);
  }
  if (find(waiting.gguf) != nullptr) {
    fail(Errc::kConfig, "gguf: tensor is given twice, expected once", site);
  }
  waiting.number = spool_.add({DType::kU8, {static_cast<std::int64_t>(bytes.size())}, bytes});
  tensors_.push_back(std::move(waiting));
}

const GgufModelWriter::Waiting* GgufModelWriter::find(const std::string& gguf) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const Waiting& w) { return w.gguf == gguf; });
  return found == tensors_.end() ? nullptr : &*found;
}

void GgufModelWriter::add_layer(const std::string& name, const PackedView& layer) {
  add(name + ".weight", ggml_type_of(layer.spec), {layer.spec.rows, layer.spec.cols},
      unpack_ggml(layer, serial_executor()));
}

void GgufModelWriter::add_tensor(const std::string& name, const TensorView& tensor) {
  if (name.ends_with(".rotary_emb.inv_freq")) return;  // follows from rope_theta
  if (!is_weight_dtype(tensor.dtype)) {
    fail(Errc::kDtype,
         "gguf: tensor has dtype " + std::string(dtype_name(tensor.dtype)) +
             ", expected one of f32, f16, bf16",
         {.path = path_, .tensor = name});
  }
  if (tensor.shape.size() >= 2) {
    const GgmlType type = tensor.dtype == DType::kF32   ? GgmlType::kF32
                          : tensor.dtype == DType::kF16 ? GgmlType::kF16
                                                        : GgmlType::kBF16;
    return add(name, type, tensor.shape, tensor.bytes);
  }
  const std::int64_t n = tensor.numel();
  Tensor wide = make_tensor(DType::kF32, {n});
  widen_to_f32(tensor.dtype, tensor.bytes.data(), n, reinterpret_cast<float*>(wide.bytes.data()));
  add(name, GgmlType::kF32, wide.shape, wide.bytes);
}

std::uint64_t GgufModelWriter::file_type() const {
  std::map<GgmlType, std::int64_t> elements;
  for (const Waiting& w : tensors_) {
    const bool inner = w.gguf.starts_with("blk.") && w.shape.size() >= 2;
    if (inner) elements[w.type] += checked_numel(w.shape, w.hf);
  }
  GgmlType most = GgmlType::kF32;
  for (const auto& [type, n] : elements) {
    if (n > elements[most]) most = type;
  }
  for (const auto& [type, number] : kFileTypes) {
    if (type == most) return number;
  }
  return 0;
}

void GgufModelWriter::check_complete(const std::vector<GgufPair>& llama) const {
  for (const std::string& name : required_gguf_names(integer_of(llama, "llama.block_count"))) {
    if (find(name) != nullptr) continue;
    fail(Errc::kConfig, "gguf: model has no tensor for " + name + ", expected " + hf_name(name),
         {.path = path_, .tensor = hf_name(name)});
  }
  const std::int64_t head_dim = integer_of(llama, "llama.attention.key_length");
  const std::int64_t heads = integer_of(llama, "llama.attention.head_count");
  const std::int64_t kv_heads = integer_of(llama, "llama.attention.head_count_kv");
  for (const Waiting& w : tensors_) {
    const std::int64_t own = interleaved_heads(w.hf, heads, kv_heads);
    if (own == 0 || (w.shape[0] == own * head_dim && head_dim % 2 == 0)) continue;
    fail(Errc::kConfig,
         "gguf: tensor has shape " + shape_string(w.shape) + ", expected " +
             std::to_string(own * head_dim) + " rows: " + std::to_string(own) + " heads of " +
             std::to_string(head_dim),
         {.path = path_, .tensor = w.hf});
  }
}

void GgufModelWriter::commit(const std::string& config_json, const SideTexts& texts) {
  const Waiting* embedding = find("token_embd.weight");
  const std::int64_t vocab = embedding == nullptr ? 0 : embedding->shape[0];
  std::vector<GgufPair> metadata = gguf_llama_pairs(config_json, vocab);
  check_complete(metadata);
  const std::int64_t heads = integer_of(metadata, "llama.attention.head_count");
  const std::int64_t kv_heads = integer_of(metadata, "llama.attention.head_count_kv");
  const std::vector<float> factors = gguf_rope_factors(config_json);
  metadata.push_back({"general.file_type", GgufType::kU32, file_type()});
  const bool quantized = std::any_of(tensors_.begin(), tensors_.end(),
                                     [](const Waiting& w) { return ggml_packable(w.type); });
  if (quantized) {
    metadata.push_back({"general.quantization_version", GgufType::kU32, kQuantizationVersion});
  }
  for (GgufPair& pair : gguf_tokenizer_pairs(texts, config_json, vocab)) {
    metadata.push_back(std::move(pair));
  }

  spool_.seal();
  std::vector<GgufTensorPlan> plan;
  const std::string factors_name(kRopeFactors);
  if (!factors.empty()) {
    plan.push_back({factors_name, 0, {std::ssize(factors)}, 4 * std::ssize(factors)});
  }
  for (const Waiting& w : tensors_) {
    plan.push_back({w.gguf, static_cast<std::uint32_t>(w.type), w.shape,
                    static_cast<std::int64_t>(spool_.view(w.number).bytes.size())});
  }
  GgufWriter writer(path_, metadata, std::move(plan));
  if (!factors.empty()) write_floats(writer, factors);
  for (const Waiting& w : tensors_) {
    const std::span<const std::uint8_t> bytes = spool_.view(w.number).bytes;
    const std::int64_t own = interleaved_heads(w.hf, heads, kv_heads);
    if (own == 0) {
      writer.write(bytes);
    } else {
      write_interleaved(writer, bytes, w.shape[0], w.shape[0] / own);
    }
  }
  writer.commit();
}

}  // namespace quantal::checkpoint

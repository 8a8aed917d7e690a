// Source of the names and of the rotary row order: docs/formats/gguf.md, checked against
// transformers 4.57.6 bit for bit.
#include "checkpoint/gguf_names.h"

#include <algorithm>
#include <array>
#include <set>

#include "checkpoint/sources.h"

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

constexpr std::string_view kGgufLayer = "blk.";
constexpr std::string_view kHfLayer = "model.layers.";

bool is_number(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// "<prefix>N.<kind>.weight" in its parts; false for another form.
bool split_layer(std::string_view name, std::string_view prefix, std::string_view* layer,
                 std::string_view* kind, std::string_view* suffix) {
  if (!name.starts_with(prefix)) return false;
  const std::size_t layer_end = name.find('.', prefix.size());
  const std::size_t kind_end = name.rfind('.');
  if (layer_end == std::string_view::npos || kind_end <= layer_end) return false;
  *layer = name.substr(prefix.size(), layer_end - prefix.size());
  *kind = name.substr(layer_end + 1, kind_end - layer_end - 1);
  *suffix = name.substr(kind_end);
  return is_number(*layer) && (*suffix == ".weight" || *suffix == ".bias");
}

}  // namespace

std::string hf_name(std::string_view gguf) {
  for (const NamePair& pair : kModelNames) {
    if (gguf == pair.gguf) return std::string(pair.hf);
  }
  std::string_view layer, kind, suffix;
  if (!split_layer(gguf, kGgufLayer, &layer, &kind, &suffix)) return {};
  for (const NamePair& pair : kLayerNames) {
    if (kind != pair.gguf) continue;
    return std::string(kHfLayer) + std::string(layer) + "." + std::string(pair.hf) +
           std::string(suffix);
  }
  return {};
}

std::string gguf_name(std::string_view hf) {
  for (const NamePair& pair : kModelNames) {
    if (hf == pair.hf) return std::string(pair.gguf);
  }
  std::string_view layer, kind, suffix;
  if (!split_layer(hf, kHfLayer, &layer, &kind, &suffix)) return {};
  for (const NamePair& pair : kLayerNames) {
    if (kind != pair.hf) continue;
    return std::string(kGgufLayer) + std::string(layer) + "." + std::string(pair.gguf) +
           std::string(suffix);
  }
  return {};
}

std::vector<std::string> required_gguf_names(std::int64_t blocks) {
  std::vector<std::string> names = {"token_embd.weight", "output_norm.weight"};
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (const NamePair& pair : kLayerNames) {
      names.push_back(std::string(kGgufLayer) + std::to_string(b) + "." + std::string(pair.gguf) +
                      ".weight");
    }
  }
  return names;
}

std::int64_t interleaved_heads(std::string_view hf, std::int64_t heads, std::int64_t kv_heads) {
  if (hf.find(".q_proj.") != std::string_view::npos) return heads;
  if (hf.find(".k_proj.") != std::string_view::npos) return kv_heads;
  return 0;
}

std::int64_t stored_row(std::int64_t row, std::int64_t rows_per_head) {
  const std::int64_t head = row / rows_per_head;
  const std::int64_t in_head = row % rows_per_head;
  const std::int64_t half = rows_per_head / 2;
  return head * rows_per_head + 2 * (in_head % half) + in_head / half;
}

std::vector<GgufEntry> gguf_entries(const GgufFile& file) {
  const std::int64_t heads = gguf_integer(file, "llama.attention.head_count", 0);
  const std::int64_t kv_heads = gguf_integer(file, "llama.attention.head_count_kv", heads);
  std::vector<GgufEntry> entries;
  std::set<std::string> names;
  for (const GgufTensor& tensor : file.tensors()) {
    if (tensor.name == kRopeFactors) continue;
    const ErrorSite site{.path = file.path(), .tensor = tensor.name, .offset = tensor.file_offset};
    GgufEntry entry{hf_name(tensor.name), &tensor, 0};
    if (entry.name.empty()) {
      fail(Errc::kUnsupported, "gguf: tensor has no counterpart in a llama model", site);
    }
    entry.heads = interleaved_heads(entry.name, heads, kv_heads);
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
    if (!names.insert(entry.name).second) {
      fail(Errc::kCorrupt, "gguf: two tensors are called " + entry.name + " in Hugging Face names",
           site);
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

}  // namespace quantal::checkpoint

// Sizes of a model's blocks: from the shapes of its layers, else from config.json, else assumed and
// said so.
#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "checkpoint/json.h"
#include "checkpoint/plan_parts.h"

namespace quantal::checkpoint {
namespace {

/// Far beyond any model; products of two do not overflow.
constexpr std::int64_t kMostSize = std::int64_t{1} << 31;
/// What most models have where nothing says otherwise.
constexpr std::int64_t kUsualHeadDim = 128, kSmallHeadDim = 64;

class Facts {
 public:
  explicit Facts(const std::string& config_json)
      : config_(parse_json_object(config_json, "config.json")) {
    const auto text = config_.find("text_config");  // models of several parts
    if (text != config_.end() && text->is_object()) inner_ = *text;
  }

  /// The first of `keys` that is a positive integer; 0 if there is none.
  std::int64_t first(std::initializer_list<const char*> keys) const {
    for (const Json* source : {&config_, &inner_}) {
      for (const char* key : keys) {
        const auto found = source->find(key);
        if (found == source->end() || !found->is_number_integer()) continue;
        const auto value = found->get<std::int64_t>();
        if (value > 0 && value < kMostSize) return value;
      }
    }
    return 0;
  }

 private:
  Json config_, inner_ = Json::object();
};

/// Shapes of the layers of the blocks.
struct Shapes {
  std::map<std::string, std::array<std::int64_t, 4>> units;  ///< unit: q, k, v, fused q+k+v rows
  std::int64_t query = 0, key = 0, value = 0, fused = 0, widest = 0;
  std::int64_t hidden = 0, vocabulary = 0;
  std::int64_t blocks = 0;
};

bool any_of(std::string_view name, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Shapes shapes_of(const ModelOutline& model) {
  Shapes out;
  std::map<std::string, bool> units;
  for (const OutlineTensor& tensor : model.tensors) {
    const std::string module = module_name(tensor);
    if (is_lookup(tensor) && tensor.shape[0] > out.vocabulary) {
      out.vocabulary = tensor.shape[0];
      out.hidden = tensor.shape[1];
    }
    const std::string unit = unit_of(tensor.name);
    if (!multiplies(tensor) || unit.empty()) continue;
    units[unit] = true;
    const std::string_view last = last_part(module);
    const std::int64_t rows = tensor.shape[0];
    if (any_of(last, {"q_proj", "wq", "query", "to_q"})) out.query = std::max(out.query, rows);
    if (any_of(last, {"k_proj", "wk", "key", "to_k"})) out.key = std::max(out.key, rows);
    if (any_of(last, {"v_proj", "wv", "value", "to_v"})) out.value = std::max(out.value, rows);
    if (any_of(last, {"qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj", "qkv"})) {
      out.fused = std::max(out.fused, rows);
    }
    out.widest = std::max({out.widest, rows, tensor.shape[1]});
  }
  out.blocks = static_cast<std::int64_t>(units.size());
  return out;
}

/// The dtype of most dense elements: activations follow it.
DType dense_dtype(const ModelOutline& model, DType otherwise) {
  std::map<DType, std::int64_t> elements;
  for (const OutlineTensor& tensor : model.tensors) {
    if (tensor.kind == OutlineTensor::Kind::kBuffer || !is_weight_dtype(tensor.dtype)) continue;
    elements[tensor.dtype] += std::min(numel_of(tensor), kMostSize);
  }
  DType most = otherwise;
  std::int64_t count = 0;
  for (const auto& [dtype, n] : elements) {
    if (n > count) most = dtype, count = n;
  }
  return most;
}

void set_heads(const Facts& facts, PlanSizes& sizes, std::vector<std::string>& notes) {
  sizes.heads = facts.first({"num_attention_heads", "n_head", "n_heads"});
  if (sizes.heads != 0 || sizes.query == 0) return;
  const std::int64_t dim = sizes.query % kUsualHeadDim == 0 ? kUsualHeadDim : kSmallHeadDim;
  sizes.heads = std::max<std::int64_t>(1, sizes.query / dim);
  notes.push_back("no config.json says how many attention heads there are: assumed " +
                  std::to_string(sizes.heads) + " of " + std::to_string(dim));
}

void set_attention(const Facts& facts, const Shapes& shapes, PlanSizes& sizes,
                   std::vector<std::string>& notes) {
  if (shapes.query != 0 && shapes.key != 0) {
    sizes.query = shapes.query;
    sizes.key_value = shapes.key + (shapes.value == 0 ? shapes.key : shapes.value);
    return;
  }
  const std::int64_t heads = facts.first({"num_attention_heads", "n_head", "n_heads"});
  std::int64_t dim = facts.first({"head_dim"});
  if (dim == 0 && heads != 0) dim = sizes.hidden / heads;
  const std::int64_t kv = facts.first({"num_key_value_heads"});
  if (heads != 0 && dim != 0) {
    sizes.query = heads * dim;
    sizes.key_value = 2 * dim * (kv == 0 ? heads : kv);
  } else if (shapes.fused != 0) {
    sizes.query = std::min(shapes.fused, sizes.hidden == 0 ? shapes.fused / 3 : sizes.hidden);
    sizes.key_value = shapes.fused - sizes.query;
  } else if (shapes.blocks != 0) {
    sizes.query = sizes.hidden;
    sizes.key_value = 2 * sizes.hidden;
    notes.emplace_back(
        "no projections of queries and keys found: assumed as wide as the hidden state");
  }
}

}  // namespace

PlanSizes sizes_of(const ModelOutline& model, const PlanOptions& options, DType compute_dtype,
                   std::vector<std::string>& notes) {
  const Facts facts(model.config_json);
  const Shapes shapes = shapes_of(model);
  PlanSizes sizes;
  sizes.compute_dtype = compute_dtype;
  sizes.activation_dtype = dense_dtype(model, compute_dtype);
  if (options.mode == PlanMode::kQlora && options.float32_norms) {
    sizes.activation_dtype = DType::kF32;
  }
  sizes.hidden = shapes.hidden != 0 ? shapes.hidden : facts.first({"hidden_size", "n_embd"});
  sizes.vocabulary =
      shapes.vocabulary != 0 ? shapes.vocabulary : facts.first({"vocab_size", "n_vocab"});
  sizes.blocks = shapes.blocks;
  sizes.widest = shapes.widest;
  if (sizes.hidden == 0 && shapes.blocks != 0) {
    sizes.hidden = shapes.widest;
    notes.emplace_back("no embedding and no hidden_size found: assumed the widest layer's width");
  }
  set_attention(facts, shapes, sizes, notes);
  set_heads(facts, sizes, notes);
  if (shapes.blocks == 0) {
    notes.emplace_back("no numbered blocks found: activations are not counted");
  }
  return sizes;
}

}  // namespace quantal::checkpoint

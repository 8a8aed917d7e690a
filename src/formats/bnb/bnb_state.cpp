#include "formats/bnb/bnb_state.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/json_text.h"
#include "formats/tensors.h"

namespace quantal::bnb {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kWhere = "bnb";
constexpr std::size_t kMaxDims = 8;

[[noreturn]] void corrupt(const std::string& name, const std::string& text) {
  fail(Errc::kCorrupt, std::string(kWhere) + ": " + text, {.path = {}, .tensor = name});
}

std::string shown(const Json& json, const char* key) {
  const auto it = json.find(key);
  return std::string("quant_state member ") + key + " is " +
         (it == json.end() ? "missing" : it->dump(-1, ' ', true, Json::error_handler_t::replace));
}

bool is_size(const Json& value) {
  return value.is_number_integer() && value.get<std::int64_t>() >= 1 &&
         (!value.is_number_unsigned() || value.get<std::uint64_t>() >> 63 == 0);
}

std::int64_t json_size(const Json& json, const char* key, const std::string& name) {
  const auto it = json.find(key);
  if (it == json.end() || !is_size(*it)) {
    corrupt(name, shown(json, key) + ", expected an integer >= 1");
  }
  return it->get<std::int64_t>();
}

std::string json_text(const Json& json, const char* key, const std::string& name) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_string()) corrupt(name, shown(json, key) + ", expected a string");
  return it->get<std::string>();
}

void read_shape(const Json& json, State& state) {
  const auto it = json.find("shape");
  const bool sizes = it != json.end() && it->is_array() && !it->empty() && it->size() <= kMaxDims &&
                     std::all_of(it->begin(), it->end(), is_size);
  if (!sizes) {
    corrupt(state.name, shown(json, "shape") + ", expected a list of 1 to " +
                            std::to_string(kMaxDims) + " sizes >= 1");
  }
  state.shape = it->get<std::vector<std::int64_t>>();
  state.cols = state.shape.back();
  state.rows = checked_numel(std::span(state.shape).first(state.shape.size() - 1),
                             "bnb: elements of " + state.name);
  checked_mul(state.rows, state.cols, "bnb: elements of " + state.name);
}

void read_nested(const Json& json, State& state) {
  state.nested = json.contains("nested_offset");
  if (!state.nested) return;
  if (!json["nested_offset"].is_number()) {
    corrupt(state.name, shown(json, "nested_offset") + ", expected a number");
  }
  const auto offset = json["nested_offset"].get<double>();
  state.nested_offset = static_cast<float>(offset);
  if (!std::isfinite(state.nested_offset)) {
    corrupt(state.name, shown(json, "nested_offset") + ", expected a finite float32");
  }
  state.nested_block_size = json_size(json, "nested_blocksize", state.name);
}

/// Members common to both forms.
void read_members(const Json& json, State& state) {
  state.block_size = json_size(json, "blocksize", state.name);
  state.value_dtype = parse_dtype(json_text(json, "dtype", state.name));
  if (!is_weight_dtype(state.value_dtype)) {
    corrupt(state.name, "dtype is " + std::string(dtype_name(state.value_dtype)) +
                            ", expected one of float32, float16, bfloat16");
  }
  read_shape(json, state);
  read_nested(json, state);
}

// ------------------------------------------------------------------ individual entries

/// Text, integers or a number of one entry, as JSON; null if the dtype is none of these.
Json entry_value(const TensorView& tensor, const std::string& name) {
  constexpr std::array<DType, 5> kKinds = {DType::kU8, DType::kI32, DType::kI64, DType::kF32,
                                           DType::kF64};
  require_dtype(tensor, name, kWhere, kKinds);
  if (tensor.dtype == DType::kU8) return text_of(tensor);
  Json list = Json::array();
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    const std::uint8_t* at =
        tensor.bytes.data() + i * static_cast<std::int64_t>(dtype_size(tensor.dtype));
    const auto push = [&](auto value) {
      std::memcpy(&value, at, sizeof(value));
      list.push_back(value);
    };
    if (tensor.dtype == DType::kI32) push(std::int32_t{});
    if (tensor.dtype == DType::kI64) push(std::int64_t{});
    if (tensor.dtype == DType::kF32) push(float{});
    if (tensor.dtype == DType::kF64) push(double{});
  }
  return tensor.shape.empty() ? list.at(0) : list;
}

State read_entries(const std::string& prefix, const TensorLookup& lookup) {
  constexpr std::array<const char*, 6> kEntries = {
      "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"};
  State state;
  state.name = prefix + "weight.quant_type";
  Json json = Json::object();
  for (const char* entry : kEntries) {
    const std::string name = prefix + "weight." + entry;
    if (const TensorView* tensor = lookup(name)) json[entry] = entry_value(*tensor, name);
  }
  const std::string type = json_text(json, "quant_type", state.name);
  if (type != "nf4" && type != "fp4") {
    corrupt(state.name, shown(json, "quant_type") + ", expected one of nf4, fp4");
  }
  state.fp4 = type == "fp4";
  read_members(json, state);
  return state;
}

}  // namespace

std::string state_key(bool fp4) {
  return std::string("weight.quant_state.bitsandbytes__") + (fp4 ? "fp4" : "nf4");
}

bool has_state(const std::function<bool(const std::string& suffix)>& has) {
  return has(state_key(false)) || has(state_key(true)) ||
         (has("weight.quant_type") && has("weight.absmax"));
}

Json parse_state(const TensorView& tensor, const std::string& name) {
  try {
    return parse_json_object(text_of(tensor), "");
  } catch (const Error& e) {
    corrupt(name, std::string("quant_state: ") + e.what());
  }
}

State read_state(const std::string& prefix, const TensorLookup& lookup) {
  State state;
  const std::string nf4 = prefix + state_key(false), fp4 = prefix + state_key(true);
  state.fp4 = lookup(fp4) != nullptr;
  state.name = state.fp4 ? fp4 : nf4;
  if (state.fp4 && lookup(nf4) != nullptr) corrupt(fp4, "a layer has both an nf4 and an fp4 state");
  if (lookup(state.name) == nullptr && lookup(prefix + "weight.quant_type") != nullptr) {
    return read_entries(prefix, lookup);
  }
  const TensorView& tensor = require_tensor(lookup, state.name, kWhere);
  constexpr std::array<DType, 1> kBytes = {DType::kU8};
  require_dtype(tensor, state.name, kWhere, kBytes);
  const Json json = parse_state(tensor, state.name);
  if (json_text(json, "quant_type", state.name) != (state.fp4 ? "fp4" : "nf4")) {
    corrupt(state.name, shown(json, "quant_type") + ", expected the ending of the tensor's name");
  }
  read_members(json, state);
  return state;
}

std::string state_json(const PackedSpec& spec, const Flags& flags,
                       std::span<const std::int64_t> shape, std::optional<float> nested_offset) {
  std::string sizes = join_numbers(shape);
  std::string json = std::string("{\"quant_type\": \"") + (flags.fp4 ? "fp4" : "nf4") +
                     "\", \"blocksize\": " + std::to_string(spec.group_size) + ", \"dtype\": \"" +
                     std::string(dtype_torch_name(spec.value_dtype)) + "\", \"shape\": [" + sizes +
                     "]";
  if (nested_offset) {
    json += ", \"nested_blocksize\": " + std::to_string(spec.nested_group_size) +
            ", \"nested_dtype\": \"float32\", \"nested_offset\": " +
            python_repr(static_cast<double>(*nested_offset));
  }
  return json + "}";
}

}  // namespace quantal::bnb

// Layout of a layer in a state dict (bitsandbytes 0.50.2), names after `<module>.`:
//
//   weight                                uint8 [ceil(n/2), 1]; element 2k in the high nibble of
//   byte
//                                         k; or the same bytes viewed as another dtype
//                                         (quant_storage)
//   weight.absmax                         float32 [blocks], uint8 [blocks] when nested
//   weight.quant_map                      float32 [16]
//   weight.nested_absmax                  float32 [ceil(blocks/256)], nested only
//   weight.nested_quant_map               float32 [256], nested only
//   weight.quant_state.bitsandbytes__nf4  uint8, JSON text (or __fp4)
#include "formats/bnb/bnb_checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/bnb/bnb_params.h"
#include "formats/tensors.h"

namespace quantal::bnb {
namespace {

constexpr std::string_view kWhere = "bnb";
constexpr std::string_view kStateKey = "weight.quant_state.bitsandbytes__";

/// Codes of the table in `shared`, or of the named codebook.
std::array<float, 16> codebook(const PackedView& w) {
  if (w.spec.code_map == CodeMap::kFp4) return kFp4Codebook;
  if (w.spec.code_map == CodeMap::kNf4) return kNf4Codebook;
  std::array<float, 16> table{};
  std::memcpy(table.data(), w.shared.data(), sizeof(table));
  return table;
}

/// Bytes of `shared` in front of the nested second level.
std::size_t table_bytes(const PackedSpec& spec) {
  return spec.code_map == CodeMap::kTable ? 16 * sizeof(float) : 0;
}

/// Flat nibbles of the whole matrix, two per byte, high one first; rows may begin inside a byte.
std::vector<std::uint8_t> pack_flat(const PackedView& w, const Flags& flags) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const std::int64_t n = spec.rows * spec.cols;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(ceil_div(n, 2)));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * layout.code_bytes, spec.cols, row.data());
    const std::uint8_t* q = row.data();
    std::int64_t left = spec.cols;
    std::uint8_t* out = bytes.data() + r * spec.cols / 2;
    if ((r * spec.cols) % 2 != 0) {
      *out++ |= *q++;
      --left;
    }
    for (std::int64_t k = 0; k < left / 2; ++k) {
      out[k] = static_cast<std::uint8_t>(q[2 * k] << 4 | q[2 * k + 1]);
    }
    if (left % 2 != 0) out[left / 2] = static_cast<std::uint8_t>(q[left - 1] << 4);
  }
  if (n % 2 != 0)
    bytes.back() = static_cast<std::uint8_t>(bytes.back() | (pad_nibble(flags.fp4) ^ flags.pad));
  return bytes;
}

/// Inverse of pack_flat, into rows of `w`.
void unpack_flat(std::span<const std::uint8_t> bytes, PackedMatrix& w) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols) + 1);
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    const std::uint8_t* in = bytes.data() + r * spec.cols / 2;
    std::uint8_t* q = row.data();
    std::int64_t left = spec.cols;
    if ((r * spec.cols) % 2 != 0) {
      *q++ = *in++ & 15;
      --left;
    }
    for (std::int64_t k = 0; k < left / 2; ++k) {
      q[2 * k] = in[k] >> 4;
      q[2 * k + 1] = in[k] & 15;
    }
    if (left % 2 != 0) q[left - 1] = in[left / 2] >> 4;
    pack_row(spec.bits, row.data(), spec.cols, w.codes.data() + r * layout.code_bytes);
  }
}

std::string state_json(const PackedSpec& spec, const Flags& flags, std::optional<float> offset) {
  std::string json = std::string("{\"quant_type\": \"") + (flags.fp4 ? "fp4" : "nf4") +
                     "\", \"blocksize\": " + std::to_string(spec.group_size) + ", \"dtype\": \"" +
                     std::string(dtype_torch_name(spec.value_dtype)) + "\", \"shape\": [" +
                     std::to_string(spec.rows) + ", " + std::to_string(spec.cols) + "]";
  if (offset) {
    json += ", \"nested_blocksize\": " + std::to_string(spec.nested_group_size) +
            ", \"nested_dtype\": \"float32\", \"nested_offset\": " +
            python_repr(static_cast<double>(*offset));
  }
  return json + "}";
}

// ------------------------------------------------------------------ import

[[noreturn]] void corrupt(const std::string& name, const std::string& text) {
  fail(Errc::kCorrupt, std::string(kWhere) + ": " + text, {.path = {}, .tensor = name});
}

/// The quant_state of a layer, checked.
struct State {
  std::string name;
  bool fp4 = false;
  bool nested = false;
  std::int64_t block_size = 0, rows = 0, cols = 0, nested_block_size = kNestedBlock;
  DType value_dtype = DType::kF32;
  float nested_offset = 0;
};

std::int64_t json_size(const nlohmann::json& json, const char* key, const std::string& name) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number_integer() || it->get<std::int64_t>() < 1) {
    corrupt(name, std::string("quant_state member ") + key + " is " +
                      (it == json.end() ? "missing" : it->dump()) + ", expected an integer >= 1");
  }
  return it->get<std::int64_t>();
}

std::string json_text(const nlohmann::json& json, const char* key, const std::string& name) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_string()) {
    corrupt(name, std::string("quant_state member ") + key + " is " +
                      (it == json.end() ? "missing" : it->dump()) + ", expected a string");
  }
  return it->get<std::string>();
}

void read_shape(const nlohmann::json& json, State& state) {
  const auto it = json.find("shape");
  const bool sizes = it != json.end() && it->is_array() &&
                     std::all_of(it->begin(), it->end(), [](const nlohmann::json& d) {
                       return d.is_number_integer() && d.get<std::int64_t>() >= 1;
                     });
  if (!sizes) corrupt(state.name, "quant_state member shape is not a list of sizes >= 1");
  if (it->size() != 2) {
    fail(Errc::kUnsupported,
         std::string(kWhere) + ": shape is " + it->dump() + ", expected 2 dimensions",
         {.path = {}, .tensor = state.name});
  }
  state.rows = (*it)[0].get<std::int64_t>();
  state.cols = (*it)[1].get<std::int64_t>();
}

State read_state(const std::string& prefix, const TensorLookup& lookup) {
  State state;
  const std::string nf4 = prefix + std::string(kStateKey) + "nf4";
  const std::string fp4 = prefix + std::string(kStateKey) + "fp4";
  state.fp4 = lookup(fp4) != nullptr;
  state.name = state.fp4 ? fp4 : nf4;
  if (state.fp4 && lookup(nf4) != nullptr) corrupt(fp4, "a layer has both an nf4 and an fp4 state");
  const TensorView& tensor = require_tensor(lookup, state.name, kWhere);
  constexpr std::array<DType, 1> kBytes = {DType::kU8};
  require_dtype(tensor, state.name, kWhere, kBytes);
  const auto json = nlohmann::json::parse(text_of(tensor), nullptr, false);
  if (!json.is_object()) corrupt(state.name, "quant_state is not a JSON object");
  const std::string type = json_text(json, "quant_type", state.name);
  if (type != (state.fp4 ? "fp4" : "nf4")) {
    corrupt(state.name, "quant_type is '" + type + "', expected the ending of the tensor name");
  }
  state.block_size = json_size(json, "blocksize", state.name);
  state.value_dtype = parse_dtype(json_text(json, "dtype", state.name));
  if (!is_weight_dtype(state.value_dtype)) {
    corrupt(state.name, "dtype is " + std::string(dtype_name(state.value_dtype)) +
                            ", expected one of float32, float16, bfloat16");
  }
  read_shape(json, state);
  state.nested = json.contains("nested_offset");
  if (state.nested) {
    const nlohmann::json& offset = json["nested_offset"];
    if (!offset.is_number()) corrupt(state.name, "nested_offset is not a number");
    state.nested_offset = offset.get<float>();
    state.nested_block_size = json_size(json, "nested_blocksize", state.name);
  }
  return state;
}

/// A float32 tensor of exactly n elements.
const TensorView& float_tensor(const TensorLookup& lookup, const std::string& name,
                               std::int64_t n) {
  const TensorView& tensor = require_tensor(lookup, name, kWhere);
  constexpr std::array<DType, 1> kFloat = {DType::kF32};
  require_dtype(tensor, name, kWhere, kFloat);
  require_numel(tensor, name, kWhere, n);
  return tensor;
}

/// absmax of every block; its dtype chooses the scale source.
const TensorView& absmax_tensor(const State& state, const std::string& name,
                                const TensorLookup& lookup, std::int64_t blocks) {
  constexpr std::array<DType, 3> kFloats = {DType::kF32, DType::kF16, DType::kBF16};
  constexpr std::array<DType, 1> kCodes = {DType::kU8};
  const TensorView& tensor = require_tensor(lookup, name, kWhere);
  require_dtype(tensor, name, kWhere,
                state.nested ? std::span<const DType>(kCodes) : std::span<const DType>(kFloats));
  require_numel(tensor, name, kWhere, blocks);
  return tensor;
}

PackedSpec import_spec(const State& state, const TensorView& absmax, bool own_table, Flags flags) {
  PackedSpec spec;
  spec.rows = state.rows;
  spec.cols = state.cols;
  spec.bits = 4;
  spec.code_map = own_table ? CodeMap::kTable : state.fp4 ? CodeMap::kFp4 : CodeMap::kNf4;
  spec.scale = state.nested ? ScaleSource::kNestedU8 : scale_source_of(absmax.dtype);
  spec.value_dtype = state.value_dtype;
  spec.group_size = state.block_size;
  spec.nested_group_size = state.nested_block_size;
  spec.dialect = kDialectId;
  spec.dialect_flags = flags.to_int();
  validate_spec(spec);
  return spec;
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const bool nested = spec.scale == ScaleSource::kNestedU8;
  std::vector<NamedTensor> out;
  const auto add = [&](std::string_view suffix, Tensor tensor) {
    out.push_back({prefix + std::string(suffix), std::move(tensor)});
  };
  std::vector<std::uint8_t> bytes = pack_flat(w, flags);
  const auto item = static_cast<std::int64_t>(dtype_size(flags.storage));
  const std::int64_t items = static_cast<std::int64_t>(bytes.size()) / item;
  add("weight", Tensor{flags.storage, {items, 1}, std::move(bytes)});

  GatheredStats stats = gather_stats(w);
  const DType absmax_type = scale_dtype(spec.scale);
  const auto blocks = static_cast<std::int64_t>(stats.scales.size() / dtype_size(absmax_type));
  add("weight.absmax", Tensor{absmax_type, {blocks}, std::move(stats.scales)});
  const std::array<float, 16> map = codebook(w);
  add("weight.quant_map",
      tensor_of(DType::kF32, {16},
                {reinterpret_cast<const std::uint8_t*>(map.data()), sizeof(map)}));
  std::optional<float> offset;
  if (nested) {
    const std::uint8_t* second = w.shared.data() + table_bytes(spec);
    offset.emplace();
    std::memcpy(&*offset, second, sizeof(float));
    const auto* absmax2 = reinterpret_cast<const std::uint8_t*>(stats.absmax2.data());
    add("weight.nested_absmax",
        tensor_of(DType::kF32, {static_cast<std::int64_t>(stats.absmax2.size())},
                  {absmax2, stats.absmax2.size() * sizeof(float)}));
    add("weight.nested_quant_map",
        tensor_of(DType::kF32, {256}, {second + sizeof(float), 256 * sizeof(float)}));
  }
  add(std::string(kStateKey) + (flags.fp4 ? "fp4" : "nf4"),
      tensor_of_text(state_json(spec, flags, offset)));
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  return has("weight") &&
         (has(std::string(kStateKey) + "nf4") || has(std::string(kStateKey) + "fp4"));
}

PackedMatrix import_layer(const std::string& prefix, const TensorLookup& lookup,
                          const LayerFacts&) {
  const State state = read_state(prefix, lookup);
  const std::int64_t n = checked_mul(state.rows, state.cols, "bnb: elements of " + state.name);
  const std::int64_t blocks = ceil_div(n, state.block_size);

  const std::string weight_name = prefix + "weight";
  const TensorView& weight = require_tensor(lookup, weight_name, kWhere);
  constexpr std::array<DType, 5> kStorage = {DType::kU8, DType::kI8, DType::kF16, DType::kBF16,
                                             DType::kF32};
  require_dtype(weight, weight_name, kWhere, kStorage);
  if (static_cast<std::int64_t>(weight.bytes.size()) != ceil_div(n, 2)) {
    fail(Errc::kShape,
         std::string(kWhere) + ": tensor " + weight_name + " has " +
             std::to_string(weight.bytes.size()) + " bytes, expected " +
             std::to_string(ceil_div(n, 2)) + " for " + std::to_string(n) + " weights",
         {.path = {}, .tensor = weight_name});
  }
  const TensorView& absmax = absmax_tensor(state, prefix + "weight.absmax", lookup, blocks);
  const TensorView& map = float_tensor(lookup, prefix + "weight.quant_map", 16);
  const std::array<float, 16>& standard = state.fp4 ? kFp4Codebook : kNf4Codebook;
  const bool own_table = std::memcmp(map.bytes.data(), standard.data(), sizeof(standard)) != 0;
  Flags flags{.fp4 = state.fp4, .storage = weight.dtype};
  if (n % 2 != 0) {
    flags.pad = static_cast<std::uint8_t>((weight.bytes.back() & 15) ^ pad_nibble(state.fp4));
  }

  PackedMatrix w = make_packed(import_spec(state, absmax, own_table, flags));
  unpack_flat(weight.bytes, w);
  std::uint8_t* shared = w.shared.data();
  if (own_table) {
    std::memcpy(shared, map.bytes.data(), map.bytes.size());
    shared += map.bytes.size();
  }
  std::vector<float> absmax2;
  if (state.nested) {
    const std::int64_t second = ceil_div(blocks, state.nested_block_size);
    const TensorView& values = float_tensor(lookup, prefix + "weight.nested_absmax", second);
    absmax2.resize(static_cast<std::size_t>(second));
    std::memcpy(absmax2.data(), values.bytes.data(), values.bytes.size());
    const TensorView& nested_map = float_tensor(lookup, prefix + "weight.nested_quant_map", 256);
    std::memcpy(shared, &state.nested_offset, sizeof(float));
    std::memcpy(shared + sizeof(float), nested_map.bytes.data(), nested_map.bytes.size());
  }
  spread_stats(w.spec, {absmax.bytes.data(), nullptr, absmax2.data()}, 0, w.stats.data(),
               serial_executor());
  return w;
}

// ------------------------------------------------------------------ quantization_config

std::string hf_quantization_config(const QuantizeOptions& options,
                                   std::span<const std::string> skip_modules) {
  nlohmann::ordered_json json;
  json["_load_in_4bit"] = true;
  json["_load_in_8bit"] = false;
  json["bnb_4bit_compute_dtype"] = dtype_torch_name(options.value_dtype);
  json["bnb_4bit_quant_storage"] = "uint8";
  json["bnb_4bit_quant_type"] = options.quant_type;
  json["bnb_4bit_use_double_quant"] = options.double_quant;
  json["llm_int8_enable_fp32_cpu_offload"] = false;
  json["llm_int8_has_fp16_weight"] = false;
  json["llm_int8_skip_modules"] =
      std::vector<std::string>(skip_modules.begin(), skip_modules.end());
  json["llm_int8_threshold"] = 6.0;
  json["load_in_4bit"] = true;
  json["load_in_8bit"] = false;
  json["quant_method"] = "bitsandbytes";
  return json.dump();
}

bool parse_hf_quantization_config(const std::string& text, QuantizeOptions& options) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object() || json.value("quant_method", nlohmann::json()) != "bitsandbytes" ||
      json.value("load_in_4bit", nlohmann::json()) != true) {
    return false;
  }
  const auto text_member = [&](const char* key, const char* fallback) {
    const auto it = json.find(key);
    return it != json.end() && it->is_string() ? it->get<std::string>() : std::string(fallback);
  };
  options.method = QuantizationMethod::BNB_NF4;
  options.bits = 4;
  options.quant_type = text_member("bnb_4bit_quant_type", "fp4");
  options.double_quant = json.value("bnb_4bit_use_double_quant", nlohmann::json()) == true;
  options.value_dtype = parse_dtype(text_member("bnb_4bit_compute_dtype", "float32"));
  return true;
}

}  // namespace quantal::bnb

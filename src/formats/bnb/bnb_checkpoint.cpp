// Layout of a layer in a state dict (bitsandbytes 0.50.2), names after `<module>.`:
//
//   weight                                uint8 [ceil(n/2), 1]; element 2k in the high nibble of
//                                         byte k; or the same bytes viewed as another dtype
//                                         (quant_storage)
//   weight.absmax                         float32 [blocks], uint8 [blocks] when nested
//   weight.quant_map                      float32 [16]
//   weight.nested_absmax                  float32 [ceil(blocks/256)], nested only
//   weight.nested_quant_map               float32 [256], nested only
//   weight.quant_state.bitsandbytes__nf4  uint8, JSON text (or __fp4); old torch files hold its
//                                         members one by one (bnb_state.h)
//
// and of LLM.int8: weight int8 [rows, cols], SCB float32 [rows], weight_format uint8 [] = 0.
#include "formats/bnb/bnb_checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/bnb/bnb_int8.h"
#include "formats/bnb/bnb_params.h"
#include "formats/bnb/bnb_state.h"
#include "formats/tensors.h"

namespace quantal::bnb {
namespace {

constexpr std::string_view kWhere = "bnb";

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

/// Inverse of pack_flat, for some rows.
void unpack_flat(std::span<const std::uint8_t> bytes, const PackedSpec& spec, RowRange rows,
                 std::uint8_t* out) {
  pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* q) {
    const std::uint8_t* in = bytes.data() + r * spec.cols / 2;
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
  });
}

/// Shape of the dense weight: kept as residue where it has not two dimensions.
std::vector<std::int64_t> shape_of(const PackedView& w) {
  if (w.spec.residue_bytes == 0) return {w.spec.rows, w.spec.cols};
  const auto bytes = static_cast<std::size_t>(w.spec.residue_bytes);
  std::vector<std::int64_t> shape(bytes / sizeof(std::int64_t));
  std::memcpy(shape.data(), w.shared.data() + (w.shared.size() - bytes),
              shape.size() * sizeof(std::int64_t));
  return shape;
}

// ------------------------------------------------------------------ import

/// A float32 tensor of exactly n elements.
const TensorView& float_tensor(const TensorLookup& lookup, const std::string& name,
                               std::int64_t n) {
  const TensorView& tensor = require_tensor(lookup, name, kWhere);
  constexpr std::array<DType, 1> kFloat = {DType::kF32};
  require_dtype(tensor, name, kWhere, kFloat);
  require_numel(tensor, name, kWhere, n);
  return tensor;
}

/// The packed codes of n weights.
const TensorView& weight_tensor(const TensorLookup& lookup, const std::string& name,
                                std::int64_t n) {
  const TensorView& weight = require_tensor(lookup, name, kWhere);
  require_dtype(weight, name, kWhere, kStorageTypes);
  if (static_cast<std::int64_t>(weight.bytes.size()) == ceil_div(n, 2)) return weight;
  fail(Errc::kShape,
       std::string(kWhere) + ": tensor " + name + " has " + std::to_string(weight.bytes.size()) +
           " bytes, expected " + std::to_string(ceil_div(n, 2)) + " for " + std::to_string(n) +
           " weights",
       {.path = {}, .tensor = name});
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
  if (state.shape.size() != 2) {
    spec.residue_bytes = static_cast<std::int64_t>(state.shape.size() * sizeof(std::int64_t));
  }
  validate_spec(spec);
  return spec;
}

/// `llm_int8_threshold` of a layer's settings.
float threshold_of(const LayerFacts& facts) {
  const auto json = nlohmann::json::parse(facts.settings, nullptr, false);
  const auto it = json.is_object() ? json.find("llm_int8_threshold") : json.end();
  return json.is_object() && it != json.end() && it->is_number() ? it->get<float>()
                                                                 : kDefaultThreshold;
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  if (is_int8(spec)) return export_int8(w, prefix);
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
  add(state_key(flags.fp4), tensor_of_text(state_json(spec, flags, shape_of(w), offset)));
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  return has("weight") && (has_state(has) || has("SCB"));
}

StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts) {
  if (lookup(prefix + "SCB") != nullptr) return open_int8(prefix, lookup, threshold_of(facts));
  const State state = read_state(prefix, lookup);
  const std::int64_t n = state.rows * state.cols;
  const std::int64_t blocks = ceil_div(n, state.block_size);
  const TensorView& weight = weight_tensor(lookup, prefix + "weight", n);
  const TensorView& absmax = absmax_tensor(state, prefix + "weight.absmax", lookup, blocks);
  const TensorView& map = float_tensor(lookup, prefix + "weight.quant_map", 16);
  const std::array<float, 16>& standard = state.fp4 ? kFp4Codebook : kNf4Codebook;
  const bool own_table = std::memcmp(map.bytes.data(), standard.data(), sizeof(standard)) != 0;
  Flags flags{.fp4 = state.fp4, .storage = weight.dtype};
  if (n % 2 != 0) {
    flags.pad = static_cast<std::uint8_t>((weight.bytes.back() & 15) ^ pad_nibble(state.fp4));
  }

  StoredLayer layer;
  layer.spec = import_spec(state, absmax, own_table, flags);
  layer.spec_from_values = n % 2 != 0;
  const auto keep = [&](const void* bytes, std::size_t size) {
    const auto* from = static_cast<const std::uint8_t*>(bytes);
    layer.shared.insert(layer.shared.end(), from, from + size);
  };
  if (own_table) keep(map.bytes.data(), map.bytes.size());
  std::vector<float> absmax2;
  if (state.nested) {
    const std::int64_t second = ceil_div(blocks, state.nested_block_size);
    const TensorView& values = float_tensor(lookup, prefix + "weight.nested_absmax", second);
    absmax2.resize(static_cast<std::size_t>(second));
    std::memcpy(absmax2.data(), values.bytes.data(), values.bytes.size());
    const TensorView& nested_map = float_tensor(lookup, prefix + "weight.nested_quant_map", 256);
    keep(&state.nested_offset, sizeof(float));
    keep(nested_map.bytes.data(), nested_map.bytes.size());
  }
  if (layer.spec.residue_bytes != 0) {
    keep(state.shape.data(), static_cast<std::size_t>(layer.spec.residue_bytes));
  }
  layer.read_codes = [spec = layer.spec, bytes = weight.bytes](RowRange rows, std::uint8_t* out) {
    unpack_flat(bytes, spec, rows, out);
  };
  layer.read_stats = [spec = layer.spec, scales = absmax.bytes, second = std::move(absmax2)](
                         RowRange rows, std::uint8_t* out) {
    spread_rows(spec, {scales.data(), nullptr, second.data()}, rows, out);
  };
  return layer;
}

}  // namespace quantal::bnb

// Layout of a layer in a safetensors state dict (hqq 0.2.8.post1), names after `<module>.`:
//
//   W_q               uint8 [R, C] at 8 bits; [R/2, C] at 4 bits, byte (i, j) = q(i, j) << 4 |
//                     q(i + R/2, j). [R, C] are the flattened weights by groups. With view_as_float
//                     the same bytes viewed as compute_dtype along the last dimension
//   scale, zero       compute_dtype [R, 1] (axis 1), [1, C] (axis 0), [] (channel_wise false)
//   shape             int64 [2], of the weight
//   nbits, group_size, axis                                              int32 scalars
//   packing, compute_dtype, unpack_view_dtype                            text as uint8
//   view_as_float, quant_scale, quant_zero, offload_meta, channel_wise,
//   optimize, round_zero, stores_quant_config, encoded_state_dict        uint8 scalars
#include "formats/hqq/hqq_checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "formats/hqq/hqq_params.h"
#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

constexpr std::string_view kWhere = "hqq";

std::string packing_name(int bits) { return std::to_string(bits) + "bit_u8"; }

Tensor scalar_u8(bool value) {
  return {DType::kU8, {}, {static_cast<std::uint8_t>(value ? 1 : 0)}};
}

Tensor scalar_i32(std::int64_t value) {
  const auto narrow = static_cast<std::int32_t>(value);
  return tensor_of(DType::kI32, {},
                   {reinterpret_cast<const std::uint8_t*>(&narrow), sizeof(narrow)});
}

/// Bytes of W_q in flat order of the grouped matrix.
std::vector<std::uint8_t> pack_flat(const PackedView& w) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const std::int64_t n = spec.rows * spec.cols, half = n / 2;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(spec.bits == 8 ? n : half));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * layout.code_bytes, spec.cols, row.data());
    const std::int64_t start = r * spec.cols;
    if (spec.bits == 8) {
      std::memcpy(bytes.data() + start, row.data(), row.size());
      continue;
    }
    const std::int64_t upper = std::clamp<std::int64_t>(half - start, 0, spec.cols);
    std::uint8_t* high = bytes.data() + start;
    for (std::int64_t c = 0; c < upper; ++c)
      high[c] = static_cast<std::uint8_t>(row[static_cast<std::size_t>(c)] << 4);
    for (std::int64_t c = upper; c < spec.cols; ++c) {
      bytes[static_cast<std::size_t>(start + c - half)] |= row[static_cast<std::size_t>(c)];
    }
  }
  return bytes;
}

/// Inverse of pack_flat, into rows of `w`.
void unpack_flat(std::span<const std::uint8_t> bytes, PackedMatrix& w) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const std::int64_t half = spec.rows * spec.cols / 2;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    const std::int64_t start = r * spec.cols;
    std::uint8_t* out = w.codes.data() + r * layout.code_bytes;
    if (spec.bits == 8) {
      pack_row(8, bytes.data() + start, spec.cols, out);
      continue;
    }
    const std::int64_t upper = std::clamp<std::int64_t>(half - start, 0, spec.cols);
    const std::uint8_t* high = bytes.data() + start;
    for (std::int64_t c = 0; c < upper; ++c) row[static_cast<std::size_t>(c)] = high[c] >> 4;
    for (std::int64_t c = upper; c < spec.cols; ++c) {
      row[static_cast<std::size_t>(c)] = bytes[static_cast<std::size_t>(start + c - half)] & 15;
    }
    pack_row(4, row.data(), spec.cols, out);
  }
}

struct FlatParameters {
  std::vector<std::uint8_t> scales, zeros;
};

FlatParameters flat_parameters(const PackedView& w) {
  if (w.spec.group_map == GroupMap::kRowRuns) {
    GatheredStats stats = gather_stats(w);
    return {std::move(stats.scales), std::move(stats.offsets)};
  }
  const std::size_t item = dtype_size(scale_dtype(w.spec.scale));
  FlatParameters out;
  for (std::size_t i = 0; i < w.stats.size(); i += 2 * item) {
    const std::uint8_t* at = w.stats.data() + i;
    out.scales.insert(out.scales.end(), at, at + item);
    out.zeros.insert(out.zeros.end(), at + item, at + 2 * item);
  }
  return out;
}

// ------------------------------------------------------------------ import

/// Typed access to the encoded fields of one layer.
class Fields {
 public:
  Fields(const std::string& prefix, const TensorLookup& lookup)
      : prefix_(prefix), lookup_(lookup) {}

  std::string name(std::string_view field) const { return prefix_ + std::string(field); }
  const TensorView& tensor(std::string_view field) const {
    return require_tensor(lookup_, name(field), kWhere);
  }
  bool has(std::string_view field) const { return lookup_(name(field)) != nullptr; }

  std::int64_t integer(std::string_view field) const {
    constexpr std::array<DType, 3> kIntegers = {DType::kI32, DType::kI64, DType::kU8};
    const TensorView& t = tensor(field);
    if (t.dtype == DType::kF32) {
      fail(Errc::kUnsupported,
           std::string(kWhere) + ": " + std::string(field) + " is a fraction, expected an integer",
           {.path = {}, .tensor = name(field)});
    }
    require_dtype(t, name(field), kWhere, kIntegers);
    require_numel(t, name(field), kWhere, 1);
    return read_integer(t, 0);
  }
  bool flag(std::string_view field, bool fallback) const {
    return has(field) ? integer(field) != 0 : fallback;
  }
  std::string text(std::string_view field) const {
    constexpr std::array<DType, 1> kBytes = {DType::kU8};
    require_dtype(tensor(field), name(field), kWhere, kBytes);
    return text_of(tensor(field));
  }
  static std::int64_t read_integer(const TensorView& t, std::size_t i) {
    if (t.dtype == DType::kU8) return t.bytes[i];
    if (t.dtype == DType::kI64) return read<std::int64_t>(t, i);
    return read<std::int32_t>(t, i);
  }

  [[noreturn]] void refuse(Errc code, std::string_view field, const std::string& actual,
                           const std::string& expected) const {
    fail(code,
         std::string(kWhere) + ": " + std::string(field) + " is " + actual + ", expected " +
             expected,
         {.path = {}, .tensor = name(field)});
  }

 private:
  template <class T>
  static T read(const TensorView& t, std::size_t i) {
    T value;
    std::memcpy(&value, t.bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }

  const std::string& prefix_;
  const TensorLookup& lookup_;
};

void read_shape(const Fields& fields, PackedSpec& spec) {
  constexpr std::array<DType, 1> kInt64 = {DType::kI64};
  const TensorView& shape = fields.tensor("shape");
  require_dtype(shape, fields.name("shape"), kWhere, kInt64);
  if (shape.numel() != 2) {
    fields.refuse(Errc::kUnsupported, "shape", std::to_string(shape.numel()) + " dimensions", "2");
  }
  spec.rows = Fields::read_integer(shape, 0);
  spec.cols = Fields::read_integer(shape, 1);
  if (spec.rows < 1 || spec.cols < 1) {
    fields.refuse(Errc::kShape, "shape",
                  "[" + std::to_string(spec.rows) + ", " + std::to_string(spec.cols) + "]",
                  "sizes >= 1");
  }
}

/// Group map and size from axis, group_size and channel_wise.
void read_grouping(const Fields& fields, PackedSpec& spec, Flags& flags) {
  const std::int64_t n = checked_mul(spec.rows, spec.cols, "hqq: shape");
  const std::int64_t axis = fields.integer("axis");
  if (axis != 0 && axis != 1) {
    fields.refuse(Errc::kCorrupt, "axis", std::to_string(axis), "0 or 1");
  }
  spec.group_map = axis == 1 ? GroupMap::kRowRuns : GroupMap::kColumnRuns;
  flags.channel_wise = fields.flag("channel_wise", true);
  std::int64_t size = axis == 1 ? spec.cols : spec.rows;
  if (fields.has("group_size")) size = fields.integer("group_size");
  if (size < 1 || n % size != 0) {
    fields.refuse(Errc::kCorrupt, "group_size", std::to_string(size),
                  "a divisor of the " + std::to_string(n) + " weights");
  }
  spec.group_size = size;
  if (flags.channel_wise) return;
  if (axis == 0) {
    fields.refuse(Errc::kUnsupported, "channel_wise", "false with axis 0", "true");
  }
  flags.stored_group_size = size;
  spec.group_size = n;
}

void read_settings(const Fields& fields, PackedSpec& spec, Flags& flags) {
  const std::int64_t bits = fields.integer("nbits");
  if (bits != 4 && bits != 8) {
    fields.refuse(Errc::kUnsupported, "nbits", std::to_string(bits), "one of 4, 8");
  }
  spec.bits = static_cast<int>(bits);
  if (fields.has("packing") && fields.text("packing") != packing_name(spec.bits)) {
    fields.refuse(Errc::kCorrupt, "packing", "'" + fields.text("packing") + "'",
                  packing_name(spec.bits));
  }
  for (const char* field : {"quant_scale", "quant_zero"}) {
    if (fields.flag(field, false)) {
      fields.refuse(Errc::kUnsupported, field, "true", "false (plain scale and zero)");
    }
  }
  spec.value_dtype = parse_dtype(fields.text("compute_dtype"));
  if (!is_weight_dtype(spec.value_dtype)) {
    fields.refuse(Errc::kCorrupt, "compute_dtype", "'" + fields.text("compute_dtype") + "'",
                  "torch.float32, torch.float16 or torch.bfloat16");
  }
  flags.optimize = fields.flag("optimize", true);
  flags.round_zero = fields.flag("round_zero", spec.bits == 4);
  flags.view_as_float = fields.flag("view_as_float", false);
  flags.offload_meta = fields.flag("offload_meta", false);
}

/// scale or zero: one number per group in one of the float types.
const TensorView& parameter(const Fields& fields, std::string_view field, std::int64_t groups,
                            DType dtype) {
  const TensorView& t = fields.tensor(field);
  const std::array<DType, 1> allowed = {dtype};
  require_dtype(t, fields.name(field), kWhere, allowed);
  require_numel(t, fields.name(field), kWhere, groups);
  return t;
}

const TensorView& weight_codes(const Fields& fields, const PackedSpec& spec, const Flags& flags) {
  const TensorView& t = fields.tensor("W_q");
  const std::array<DType, 1> allowed = {flags.view_as_float ? spec.value_dtype : DType::kU8};
  require_dtype(t, fields.name("W_q"), kWhere, allowed);
  const std::int64_t n = spec.rows * spec.cols;
  const std::int64_t rows = grouping_of(spec).rows;
  // One scale for everything keeps the grouped matrix of the file's own group size.
  const std::int64_t packed_rows = flags.channel_wise ? rows : n / flags.stored_group_size;
  if (spec.bits == 4 && packed_rows % 2 != 0) {
    fields.refuse(Errc::kShape, "W_q", std::to_string(packed_rows) + " grouped rows",
                  "an even number at 4 bits");
  }
  const std::int64_t bytes = spec.bits == 8 ? n : n / 2;
  if (static_cast<std::int64_t>(t.bytes.size()) != bytes) {
    fields.refuse(Errc::kShape, "W_q", std::to_string(t.bytes.size()) + " bytes",
                  std::to_string(bytes));
  }
  return t;
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const bool columns = spec.group_map == GroupMap::kColumnRuns;
  const std::int64_t n = spec.rows * spec.cols;
  Grouping grouping = grouping_of(spec);
  const std::int64_t group_size = flags.channel_wise ? spec.group_size : flags.stored_group_size;
  if (!flags.channel_wise) grouping = {n / group_size, group_size, 1};
  std::vector<NamedTensor> out;
  const auto add = [&](std::string_view field, Tensor tensor) {
    out.push_back({prefix + std::string(field), std::move(tensor)});
  };
  const std::int64_t rows = spec.bits == 8 ? grouping.rows : grouping.rows / 2;
  const DType stored = flags.view_as_float ? spec.value_dtype : DType::kU8;
  const auto item = static_cast<std::int64_t>(dtype_size(stored));
  if (grouping.cols % item != 0) {
    fail(Errc::kUnsupported, "hqq: view_as_float with " + std::to_string(grouping.cols) +
                                 " bytes in a row, expected a multiple of " + std::to_string(item));
  }
  add("W_q", Tensor{stored, {rows, grouping.cols / item}, pack_flat(w)});
  FlatParameters parameters = flat_parameters(w);
  std::vector<std::int64_t> shape;
  if (flags.channel_wise) {
    shape = columns ? std::vector<std::int64_t>{1, grouping.groups}
                    : std::vector<std::int64_t>{grouping.groups, 1};
  }
  const DType dtype = scale_dtype(spec.scale);
  add("scale", Tensor{dtype, shape, std::move(parameters.scales)});
  add("zero", Tensor{dtype, shape, std::move(parameters.zeros)});
  const std::array<std::int64_t, 2> sizes = {spec.rows, spec.cols};
  add("shape", tensor_of(DType::kI64, {2},
                         {reinterpret_cast<const std::uint8_t*>(sizes.data()), sizeof(sizes)}));
  add("nbits", scalar_i32(spec.bits));
  add("group_size", scalar_i32(group_size));
  add("axis", scalar_i32(columns ? 0 : 1));
  add("packing", tensor_of_text(packing_name(spec.bits)));
  add("compute_dtype", tensor_of_text("torch." + std::string(dtype_torch_name(spec.value_dtype))));
  add("unpack_view_dtype", tensor_of_text("torch.uint8"));
  add("view_as_float", scalar_u8(flags.view_as_float));
  add("quant_scale", scalar_u8(false));
  add("quant_zero", scalar_u8(false));
  add("offload_meta", scalar_u8(flags.offload_meta));
  add("channel_wise", scalar_u8(flags.channel_wise));
  add("optimize", scalar_u8(flags.optimize));
  add("round_zero", scalar_u8(flags.round_zero));
  add("stores_quant_config", scalar_u8(true));
  add("encoded_state_dict", scalar_u8(true));
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  return has("W_q") && has("scale") && has("zero") && has("nbits");
}

PackedMatrix import_layer(const std::string& prefix, const TensorLookup& lookup,
                          const LayerFacts&) {
  const Fields fields(prefix, lookup);
  PackedSpec spec;
  Flags flags;
  spec.offset = Offset::kZeroPoint;
  spec.dialect = kDialectId;
  read_shape(fields, spec);
  read_grouping(fields, spec, flags);
  read_settings(fields, spec, flags);
  spec.scale = scale_source_of(spec.value_dtype);
  spec.dialect_flags = flags.to_int();
  const TensorView& codes = weight_codes(fields, spec, flags);
  const std::int64_t groups = spec.rows * spec.cols / spec.group_size;
  const TensorView& scale = parameter(fields, "scale", groups, spec.value_dtype);
  const TensorView& zero = parameter(fields, "zero", groups, spec.value_dtype);

  PackedMatrix w = make_packed(spec);
  unpack_flat(codes.bytes, w);
  if (spec.group_map == GroupMap::kRowRuns) {
    spread_stats(spec, {scale.bytes.data(), zero.bytes.data(), nullptr}, 0, w.stats.data(),
                 serial_executor());
    return w;
  }
  const std::size_t item = dtype_size(spec.value_dtype);
  for (std::size_t i = 0; i < static_cast<std::size_t>(groups); ++i) {
    std::memcpy(w.stats.data() + 2 * i * item, scale.bytes.data() + i * item, item);
    std::memcpy(w.stats.data() + (2 * i + 1) * item, zero.bytes.data() + i * item, item);
  }
  return w;
}

// ------------------------------------------------------------------ quantization_config

std::string hf_quantization_config(const QuantizeOptions& options,
                                   std::span<const std::string> skip_modules) {
  nlohmann::ordered_json weight;
  weight["nbits"] = options.bits;
  weight["channel_wise"] = true;
  weight["group_size"] = nullptr;
  if (options.group_size != 0) weight["group_size"] = options.group_size;
  weight["optimize"] = options.optimize;
  weight["round_zero"] = options.round_zero.value_or(options.bits == 4);
  weight["axis"] = options.axis;
  weight["view_as_float"] = false;
  nlohmann::ordered_json json;
  json["quant_method"] = "hqq";
  json["quant_config"]["weight_quant_params"] = weight;
  json["quant_config"]["scale_quant_params"] = nullptr;
  json["quant_config"]["zero_quant_params"] = nullptr;
  json["quant_config"]["offload_meta"] = false;
  json["skip_modules"] = std::vector<std::string>(skip_modules.begin(), skip_modules.end());
  return json.dump();
}

bool parse_hf_quantization_config(const std::string& text, QuantizeOptions& options) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object() || json.value("quant_method", nlohmann::json()) != "hqq") return false;
  options.method = QuantizationMethod::HQQ;
  // Settings by layer have no weight_quant_params at this level: the layers' own tensors decide.
  const auto config = json.value("quant_config", nlohmann::json::object());
  const auto found = config.is_object() ? config.find("weight_quant_params") : config.end();
  if (found == config.end() || !found->is_object()) return true;
  const nlohmann::json& weight = *found;
  const auto integer = [&](const char* key, std::int64_t fallback) {
    const auto it = weight.find(key);
    return it != weight.end() && it->is_number_integer() ? it->get<std::int64_t>() : fallback;
  };
  const auto flag = [&](const char* key, bool fallback) {
    const auto it = weight.find(key);
    return it != weight.end() && it->is_boolean() ? it->get<bool>() : fallback;
  };
  options.bits = static_cast<int>(integer("nbits", 4));
  options.group_size = integer("group_size", 0);
  options.axis = static_cast<int>(integer("axis", 1));
  options.optimize = flag("optimize", true);
  options.round_zero = flag("round_zero", options.bits == 4);
  return true;
}

}  // namespace quantal::hqq

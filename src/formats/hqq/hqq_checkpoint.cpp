// Fields of a layer (hqq 0.2.8.post1), names after `<module>.` or, in torch files with a nested
// dictionary, `<module>.meta.`:
//
//   W_q               codes, see hqq_packing.h. With view_as_float the same bytes viewed as a
//                     float type along the last dimension; without packing codes as floats
//   scale, zero       compute_dtype [R, 1] (axis 1), [1, C] (axis 0), [] (channel_wise false);
//                     quantized or stacked: see hqq_meta.h
//   shape             size, of the weight
//   nbits             int; float 1.58 for ternary codes
//   group_size        int or None
//   axis              int
//   packing           text or None
//   compute_dtype, unpack_view_dtype                                     dtype
//   view_as_float, quant_scale, quant_zero, offload_meta                 bool
//   channel_wise, optimize, round_zero, stores_quant_config              bool, absent in old files
//   encoded_state_dict                                                   only in safetensors
#include "formats/hqq/hqq_checkpoint.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "formats/hqq/hqq_meta.h"
#include "formats/hqq/hqq_packing.h"
#include "formats/hqq/hqq_params.h"
#include "formats/hqq/hqq_state.h"
#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

// ------------------------------------------------------------------ import

void read_shape(const Fields& fields, PackedSpec& spec) {
  const std::vector<std::int64_t> shape = fields.sizes("shape");
  if (shape.size() != 2) {
    fields.refuse(Errc::kUnsupported, "shape", std::to_string(shape.size()) + " dimensions", "2");
  }
  if (shape[0] < 1 || shape[1] < 1) {
    fields.refuse(Errc::kShape, "shape", shape_string(shape), "sizes >= 1");
  }
  spec.rows = shape[0];
  spec.cols = shape[1];
}

void read_width(const Fields& fields, PackedSpec& spec, Flags& flags) {
  const double bits = fields.number("nbits");
  constexpr double kNear = 1e-3;
  flags.ternary = std::fabs(bits - static_cast<double>(kTernaryBits)) < kNear;
  const auto legal = [&](int b) { return static_cast<double>(b) == bits; };
  const auto* found = std::find_if(kBits.begin(), kBits.end(), legal);
  if (!flags.ternary && found == kBits.end()) {
    fields.refuse(Errc::kUnsupported, "nbits", python_repr(bits),
                  "one of 1, 1.58, 2, 3, 4, 5, 6, 8");
  }
  spec.bits = flags.ternary ? 2 : *found;
  const std::string_view expected = packing_name(spec.bits);
  if (fields.given("packing") && fields.text("packing") != expected) {
    fields.refuse(Errc::kCorrupt, "packing", "'" + fields.text("packing") + "'",
                  std::string(expected));
  }
}

/// Old files do not say channel_wise: then a single scale for many groups does.
bool is_channel_wise(const Fields& fields, std::int64_t groups) {
  if (fields.has("channel_wise")) return fields.flag("channel_wise", true);
  const TensorView* scale = fields.find("scale");
  return groups == 1 || scale == nullptr || scale->numel() != 1;
}

/// Group map and size from axis, group_size and channel_wise.
void read_grouping(const Fields& fields, PackedSpec& spec, Flags& flags) {
  constexpr std::int64_t kLargestStored = 0xFFFFFFFF;
  const std::int64_t n = checked_mul(spec.rows, spec.cols, "hqq: shape");
  const std::int64_t axis = fields.integer("axis");
  if (axis != 0 && axis != 1) {
    fields.refuse(Errc::kCorrupt, "axis", std::to_string(axis), "0 or 1");
  }
  flags.no_group_size = !fields.given("group_size");
  const std::int64_t whole = axis == 1 ? spec.cols : spec.rows;
  const std::int64_t size = flags.no_group_size ? whole : fields.integer("group_size");
  if (size < 1 || size > kLargestStored || n % size != 0) {
    fields.refuse(Errc::kCorrupt, "group_size", std::to_string(size),
                  "a divisor of the " + std::to_string(n) + " weights");
  }
  flags.channel_wise = is_channel_wise(fields, n / size);
  if (flags.channel_wise) {
    spec.group_map = axis == 1 ? GroupMap::kRowRuns : GroupMap::kColumnRuns;
    spec.group_size = size;
    return;
  }
  // One scale for the matrix: every row repeats it.
  spec.group_map = GroupMap::kRowRuns;
  spec.group_size = spec.cols;
  flags.along_columns = axis == 0;
  flags.stored_group_size = flags.no_group_size ? 0 : size;
}

void read_facts(const Fields& fields, PackedSpec& spec, Flags& flags) {
  spec.value_dtype = fields.dtype("compute_dtype");
  spec.scale = scale_source_of(spec.value_dtype);
  flags.no_settings = !fields.has("stores_quant_config") && !fields.has("optimize");
  flags.no_view_facts = !fields.has("view_as_float") && !fields.has("unpack_view_dtype");
  flags.no_offload_meta = !fields.has("offload_meta");
  flags.optimize = fields.flag("optimize", true);
  flags.round_zero = fields.flag("round_zero", spec.bits == 4);
  flags.view_as_float = fields.flag("view_as_float", false);
  flags.offload_meta = fields.flag("offload_meta", false);
}

/// Shape of W_q when its elements are of `stored`; the words of a row need not fill them.
std::vector<std::int64_t> stored_shape(const Packing& packing, DType stored) {
  const auto word = static_cast<std::int64_t>(dtype_size(packing.word));
  const auto item = static_cast<std::int64_t>(dtype_size(stored));
  if (packing.cols * word % item != 0) {
    fail(Errc::kUnsupported, "hqq: view_as_float with " + std::to_string(packing.cols * word) +
                                 " bytes in a row, expected a multiple of " + std::to_string(item));
  }
  return {packing.rows, packing.cols * word / item};
}

void require_shape(const TensorView& t, const std::string& name,
                   const std::vector<std::int64_t>& expected) {
  if (t.shape == expected) return;
  fail(Errc::kShape,
       "hqq: tensor " + name + " has shape " + shape_string(t.shape) + ", expected " +
           shape_string(expected),
       {.path = {}, .tensor = name});
}

/// W_q, checked against everything that follows from the other fields; sets unpacked and
/// view_dtype.
const TensorView& weight_codes(const Fields& fields, const PackedSpec& spec, const Packing& packing,
                               Flags& flags) {
  constexpr std::array<DType, 3> kFloats = {DType::kF32, DType::kF16, DType::kBF16};
  const TensorView& t = fields.tensor("W_q");
  const std::string name = fields.name("W_q");
  flags.unpacked = !fields.given("packing") && is_weight_dtype(t.dtype) && !flags.view_as_float;
  if (flags.unpacked || flags.view_as_float) {
    require_dtype(t, name, kWhere, kFloats);
    flags.view_dtype = t.dtype;
  } else {
    const std::array<DType, 1> allowed = {packing.word};
    require_dtype(t, name, kWhere, allowed);
  }
  if (flags.unpacked) {
    const Grouping grouping = grouping_of(spec);
    require_shape(t, name, {grouping.rows, grouping.cols});
  } else {
    require_shape(t, name, stored_shape(packing, t.dtype));
  }
  return t;
}

/// Fields that append_facts writes and that reading may do without: they belong to the layer.
void look_up_others(const Fields& fields) {
  for (const std::string_view field :
       {"packing", "unpack_view_dtype", "view_as_float", "offload_meta", "channel_wise", "optimize",
        "round_zero", "stores_quant_config", "encoded_state_dict"}) {
    fields.find(field);
  }
}

}  // namespace

StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& /*the tensors say everything*/) {
  const Fields fields(prefix, lookup);
  StoredLayer layer;
  PackedSpec& spec = layer.spec;
  Flags flags;
  spec.offset = Offset::kZeroPoint;
  spec.dialect = kDialectId;
  read_shape(fields, spec);
  read_width(fields, spec, flags);
  read_grouping(fields, spec, flags);
  read_facts(fields, spec, flags);
  look_up_others(fields);
  spec.dialect_flags = flags.to_int();
  const Grouping grouping = grouping_of(spec);
  const std::string name = fields.name("W_q");
  const Packing packing = packing_of(spec.bits, grouping, "hqq: " + name);
  const TensorView& codes = weight_codes(fields, spec, packing, flags);

  std::vector<NamedTensor> residue;
  const OpenParameters parameters =
      open_parameters(fields, spec.value_dtype, grouping.groups, flags, residue);
  if (!flags.unpacked) {
    std::vector<std::uint8_t> stray =
        stray_bits(codes.bytes, packing, checked_mul(grouping.rows, grouping.cols, "hqq: codes"));
    if (!stray.empty()) {
      residue.push_back({std::string(kStrayBits),
                         {packing.word, {packing.rows, packing.cols}, std::move(stray)}});
    }
  }
  layer.shared = encode_residue(residue);
  layer.spec_from_values = packing.word == DType::kI32;
  spec.dialect_flags = flags.to_int();
  spec.residue_bytes = static_cast<std::int64_t>(layer.shared.size());

  layer.read_codes = [spec, name, packing, codes, unpacked = flags.unpacked](RowRange rows,
                                                                             std::uint8_t* out) {
    if (unpacked) return codes_from_numbers(codes, name, spec, rows, out);
    unpack_codes(codes.bytes, packing, name, spec, rows, out);
  };
  layer.read_stats = [spec, parameters](RowRange rows, std::uint8_t* out) {
    write_parameters(spec, parameters, rows, out, serial_executor());
  };
  return layer;
}

// ------------------------------------------------------------------ export

namespace {

NamedTensor exported_codes(const PackedView& w, const Flags& flags,
                           std::span<const NamedTensor> residue) {
  const Grouping grouping = grouping_of(w.spec);
  if (flags.unpacked) {
    return {
        "W_q",
        {flags.view_dtype, {grouping.rows, grouping.cols}, codes_as_numbers(w, flags.view_dtype)}};
  }
  const Packing packing = packing_of(w.spec.bits, grouping, kWhere);
  std::vector<std::uint8_t> words = pack_codes(w, packing);
  for (const NamedTensor& field : residue) {
    if (field.name != kStrayBits) continue;
    check_size("hqq: residue bytes of W_q", field.tensor.bytes.size(), words.size());
    for (std::size_t i = 0; i < words.size(); ++i) words[i] |= field.tensor.bytes[i];
  }
  const DType stored = flags.view_as_float ? flags.view_dtype : packing.word;
  return {"W_q", {stored, stored_shape(packing, stored), std::move(words)}};
}

/// group_size as Python has it; where that is None, files of plain tensors get what it stands for.
void append_group_size(const PackedSpec& spec, const Flags& flags, std::vector<NamedTensor>& out) {
  const std::int64_t real = flags.channel_wise ? spec.group_size : flags.stored_group_size;
  if (!flags.no_group_size) {
    out.push_back(named_int("group_size", real));
    return;
  }
  out.push_back(named_none("group_size"));
  NamedTensor plain = named_int("group_size", flags.channel_wise    ? real
                                              : flags.along_columns ? spec.rows
                                                                    : spec.cols);
  plain.kind = StateKind::kPlainOnly;
  out.push_back(std::move(plain));
}

/// Fields other than codes and parameters.
void append_facts(const PackedSpec& spec, const Flags& flags, std::vector<NamedTensor>& out) {
  const bool columns = spec.group_map == GroupMap::kColumnRuns || flags.along_columns;
  const std::array<std::int64_t, 2> sizes = {spec.rows, spec.cols};
  // Fields that an old file lacked are written only where upstream cannot read without them.
  const auto add = [&](NamedTensor field, bool lacking) {
    if (lacking) field.kind = StateKind::kPlainOnly;
    out.push_back(std::move(field));
  };
  add(named_size("shape", sizes), false);
  add(flags.ternary ? named_float("nbits", kTernaryBits) : named_int("nbits", spec.bits), false);
  append_group_size(spec, flags, out);
  add(named_int("axis", columns ? 0 : 1), false);
  add(flags.unpacked ? named_none("packing") : named_text("packing", packing_name(spec.bits)),
      false);
  add(named_dtype("compute_dtype", spec.value_dtype), false);
  add(named_dtype("unpack_view_dtype", spec.bits == 3 ? DType::kI32 : DType::kU8),
      flags.no_view_facts);
  add(named_bool("view_as_float", flags.view_as_float), flags.no_view_facts);
  add(named_bool("quant_scale", flags.quant_scale), false);
  add(named_bool("quant_zero", flags.quant_zero), false);
  add(named_bool("offload_meta", flags.offload_meta), flags.no_offload_meta);
  add(named_bool("channel_wise", flags.channel_wise), flags.no_settings);
  add(named_bool("optimize", flags.optimize), flags.no_settings);
  add(named_bool("round_zero", flags.round_zero), flags.no_settings);
  add(named_bool("stores_quant_config", true), flags.no_settings);
  add(named_bool("encoded_state_dict", true), true);
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  check_packed(w);
  Flags flags = Flags::from_int(w.spec.dialect_flags);
  const std::vector<NamedTensor> residue =
      decode_residue(w.shared.last(static_cast<std::size_t>(w.spec.residue_bytes)));
  std::vector<NamedTensor> out;
  out.push_back(exported_codes(w, flags, residue));
  append_parameters(w.spec, parameters_of(w), residue, out);
  append_facts(w.spec, flags, out);
  for (NamedTensor& field : out) field.name = prefix + field.name;
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  if (!has("W_q")) return false;
  const auto field = [&](const std::string& name) { return has(name) || has("meta." + name); };
  const bool scale = field("scale") || field("scale_q") || field("zero_scale");
  const bool zero = field("zero") || field("zero_q") || field("zero_scale");
  return scale && zero && field("nbits");
}

}  // namespace quantal::hqq

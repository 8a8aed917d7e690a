// Reading the tensors of a layer; their names are at the top of quanto_export.cpp.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "formats/quanto/quanto_checkpoint.h"
#include "formats/quanto/quanto_pack.h"
#include "formats/tensors.h"

namespace quantal::quanto {
namespace {

constexpr std::string_view kWhere = "quanto";
constexpr std::array<DType, 3> kFloats = {DType::kF32, DType::kF16, DType::kBF16};

/// The tensors of one layer and what is known beside them.
struct Source {
  const std::string& prefix;
  const TensorLookup& lookup;
  LayerSettings settings;
  std::vector<std::int64_t> shape;  ///< of the weight; empty if unknown

  std::string name(std::string_view field) const { return prefix + std::string(field); }
  const TensorView* find(std::string_view field) const { return lookup(name(field)); }
  const TensorView& get(std::string_view field, std::span<const DType> allowed) const {
    const TensorView& t = require_tensor(lookup, name(field), kWhere);
    require_dtype(t, name(field), kWhere, allowed);
    return t;
  }
  [[noreturn]] void refuse(Errc code, std::string_view field, const std::string& text) const {
    fail(code, std::string(kWhere) + ": tensor " + name(field) + " " + text,
         {.path = {}, .tensor = name(field)});
  }
};

void require_two_dimensions(const Source& s, std::string_view field, const TensorView& t) {
  if (t.shape.size() != 2) {
    s.refuse(Errc::kUnsupported, field,
             "has shape " + shape_string(t.shape) + ", expected 2 dimensions (linear layers)");
  }
  if (t.numel() < 1) {
    s.refuse(Errc::kShape, field, "has shape " + shape_string(t.shape) + ", expected sizes >= 1");
  }
}

std::string shape_or_unknown(const std::vector<std::int64_t>& shape) {
  return shape.empty() ? "unknown" : shape_string(shape);
}

/// Shape of `_scale`: [groups, 1], [1, groups], [].
enum class Axis { kRows, kColumns, kTensor };

Axis axis_of(const Source& s, const TensorView& scale, std::int64_t row_groups,
             std::int64_t column_groups) {
  if (scale.shape.empty()) return Axis::kTensor;
  const std::vector<std::int64_t> rows = {row_groups, 1}, columns = {1, column_groups};
  if (scale.shape == rows) return Axis::kRows;
  if (scale.shape == columns) return Axis::kColumns;
  s.refuse(Errc::kShape, "weight._scale",
           "has shape " + shape_string(scale.shape) + ", expected one of " + shape_string(rows) +
               ", " + shape_string(columns) + ", [] (weight " + shape_or_unknown(s.shape) + ")");
}

// ------------------------------------------------------------------ 2 and 4 bits

/// Widths at which `grouped_rows` rows of codes fill `packed_rows` rows of bytes.
int bits_of_rows(const Source& s, std::int64_t grouped_rows, std::int64_t packed_rows) {
  const auto fits = [&](int bits) { return ceil_div(grouped_rows * bits, 8) == packed_rows; };
  const int told = bits_of(s.settings.weights);
  if (told != 0) {
    if (told != 8 && fits(told)) return told;
  } else if (fits(4) != fits(2)) {
    return fits(4) ? 4 : 2;
  } else if (fits(4)) {
    s.refuse(Errc::kUnsupported, "weight._data._data",
             "has " + std::to_string(packed_rows) + " rows for " + std::to_string(grouped_rows) +
                 " rows of codes, which is 2 or 4 bits; expected quanto_qmap.json to tell");
  }
  s.refuse(Errc::kShape, "weight._data._data",
           "has " + std::to_string(packed_rows) + " rows, expected " +
               std::to_string(grouped_rows) + " rows of " +
               (told == 0 ? "2- or 4-bit codes" : std::string(qtype_name(s.settings.weights))));
}

/// [out, in] of a weight whose grouped matrix is [grouped_rows, grouped_cols].
std::vector<std::int64_t> deduce_shape(const Source& s, std::int64_t grouped_rows,
                                       std::int64_t grouped_cols) {
  const TensorView* bias = s.find("bias");
  const auto shapes = possible_shapes(grouped_rows, grouped_cols, bias ? bias->numel() : 0);
  if (shapes.size() == 1) return shapes[0];
  std::string text = "does not tell the shape of the weight";
  for (const auto& shape : shapes) {
    text += (&shape == shapes.data() ? ": " : " or ") + shape_string(shape);
  }
  s.refuse(Errc::kUnsupported, "weight._scale",
           text +
               "; expected the [out_features, in_features] of the layer from the caller, "
               "config.json or quanto_qmap.json");
}

/// Size and groups of a 2- or 4-bit layer.
void read_grouping(const Source& s, const TensorView& data, const TensorView& scale,
                   PackedSpec& spec, Flags& flags) {
  const std::int64_t packed_rows = data.shape[0], cols = data.shape[1];
  std::vector<std::int64_t> shape = s.shape;
  if (shape.empty()) {
    if (scale.shape.size() != 2 || scale.shape[1] != 1) {
      s.refuse(Errc::kUnsupported, "weight._scale",
               "has shape " + shape_string(scale.shape) +
                   " and the shape of the weight is unknown, expected it from the caller");
    }
    shape = deduce_shape(s, scale.shape[0], cols);
  }
  const std::int64_t numel = checked_mul(shape[0], shape[1], "quanto: weight");
  if (numel % cols != 0) {
    s.refuse(Errc::kShape, "weight._data._data",
             "has rows of " + std::to_string(cols) + " bytes, expected a divisor of the weight " +
                 shape_string(shape));
  }
  const std::int64_t rows = numel / cols;
  spec.rows = shape[0];
  spec.cols = shape[1];
  const Axis axis = axis_of(s, scale, rows, cols);
  spec.bits = bits_of_rows(s, rows, packed_rows);
  const bool row_groups = axis != Axis::kColumns && spec.cols % cols == 0;
  if (axis == Axis::kTensor && cols == spec.cols) {
    flags.per_tensor = true;
    spec.group_size = cols;
  } else if (axis == Axis::kRows && row_groups) {
    spec.group_size = cols;
  } else if (axis != Axis::kTensor && rows <= spec.rows && spec.rows % rows == 0 &&
             (scale.shape[0] == 1)) {
    const bool single = spec.rows == 1;  // every weight its own group: runs of one
    spec.group_map = single ? GroupMap::kRowRuns : GroupMap::kColumnBlocks;
    spec.group_size = rows;
  } else {
    s.refuse(Errc::kShape, "weight._data._data",
             "has shape " + shape_string(data.shape) + ", which is no grouping of the weight " +
                 shape_or_unknown(shape));
  }
}

GroupNumbers read_group_numbers(const Source& s, const PackedSpec& spec, const Flags& flags,
                                const TensorView& scale, const TensorView* shift) {
  GroupNumbers out;
  const std::size_t repeat = flags.per_tensor ? static_cast<std::size_t>(spec.rows) : 1;
  const auto repeated = [repeat](std::span<const std::uint8_t> bytes) {
    std::vector<std::uint8_t> all;
    all.reserve(bytes.size() * repeat);
    for (std::size_t i = 0; i < repeat; ++i) all.insert(all.end(), bytes.begin(), bytes.end());
    return all;
  };
  out.scales = repeated(scale.bytes);
  if (shift == nullptr) return out;
  if (!flags.zero_point) {
    out.offsets = repeated(shift->bytes);
    return out;
  }
  std::vector<float> zeros(shift->bytes.begin(), shift->bytes.end());
  for (const float zero : zeros) {
    if (zero < static_cast<float>(1 << spec.bits)) continue;
    s.refuse(Errc::kCorrupt, "weight._shift",
             "holds the zero point " + std::to_string(static_cast<int>(zero)) +
                 ", expected at most " + std::to_string((1 << spec.bits) - 1));
  }
  std::vector<std::uint8_t> raw(zeros.size() * dtype_size(spec.value_dtype));
  narrow_from_f32(spec.value_dtype, zeros.data(), static_cast<std::int64_t>(zeros.size()),
                  raw.data());
  out.offsets = repeated(raw);
  return out;
}

// ------------------------------------------------------------------ 8 bits

QType byte_type(DType dtype) {
  if (dtype == DType::kF8E4M3) return QType::kFloat8E4M3;
  return dtype == DType::kF8E5M2 ? QType::kFloat8E5M2 : QType::kInt8;
}

void read_bytes_form(const Source& s, const TensorView& data, const TensorView& scale,
                     PackedSpec& spec, Flags& flags) {
  const QType type = byte_type(data.dtype);
  if (s.settings.weights != QType::kNone && s.settings.weights != type) {
    s.refuse(s.settings.weights == QType::kFloat8E4M3Fnuz ? Errc::kUnsupported : Errc::kCorrupt,
             "weight._data",
             "has dtype " + std::string(dtype_name(data.dtype)) + ", expected " +
                 std::string(qtype_name(s.settings.weights)));
  }
  if (!s.shape.empty() && s.shape != data.shape) {
    s.refuse(Errc::kShape, "weight._data",
             "has shape " + shape_string(data.shape) + ", expected " + shape_string(s.shape));
  }
  spec.bits = 8;
  spec.rows = data.shape[0];
  spec.cols = data.shape[1];
  if (type == QType::kInt8) spec.centre = kInt8Centre;
  if (type == QType::kFloat8E4M3) spec.code_map = CodeMap::kE4M3;
  if (type == QType::kFloat8E5M2) spec.code_map = CodeMap::kE5M2;
  const Axis axis = axis_of(s, scale, spec.rows, spec.cols);
  flags.per_tensor = axis == Axis::kTensor;
  spec.group_map = axis == Axis::kColumns ? GroupMap::kColumnBlocks : GroupMap::kRowRuns;
  spec.group_size = axis == Axis::kColumns ? spec.rows : spec.cols;
}

/// Float8 weights of scale 0 are NaN upstream (0 / 0); they become 0 here. Sets nan_rows if all of
/// them are kUpstreamNan, else keeps their bytes.
void clear_zero_scales(const PackedSpec& spec, const GroupNumbers& numbers,
                       std::vector<std::uint8_t>& codes, Flags& flags, Residue& residue) {
  if (spec.code_map == CodeMap::kInteger) return;
  const std::array<float, 256>& values =
      spec.code_map == CodeMap::kE4M3 ? kE4M3Values : kE5M2Values;
  const bool columns = spec.group_map == GroupMap::kColumnBlocks;
  std::vector<float> scales(numbers.scales.size() / dtype_size(spec.value_dtype));
  widen_to_f32(spec.value_dtype, numbers.scales.data(), static_cast<std::int64_t>(scales.size()),
               scales.data());
  const auto cols = static_cast<std::size_t>(spec.cols);
  std::vector<std::uint8_t> original;
  bool any_nan = false, all_upstream = true;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    if (scales[columns ? i % cols : i / cols] != 0.0F) continue;
    original.push_back(codes[i]);
    all_upstream = all_upstream && codes[i] == kUpstreamNan;
    if (std::isfinite(values[codes[i]])) continue;
    any_nan = true;
    codes[i] = 0;
  }
  flags.nan_rows = any_nan && all_upstream;
  if (any_nan && !all_upstream) residue.zero_scale_codes = std::move(original);
}

// ------------------------------------------------------------------ both

/// An activation scale; absent ones are flagged, the usual 1.0 leaves nothing behind.
std::optional<Tensor> activation_scale(const Source& s, std::string_view field, DType dtype,
                                       bool& missing) {
  missing = s.find(field) == nullptr;
  if (missing) return std::nullopt;
  const TensorView& t = s.get(field, kFloats);
  require_numel(t, s.name(field), kWhere, 1);
  if (t.shape.size() > 1) {
    s.refuse(Errc::kShape, field, "has shape " + shape_string(t.shape) + ", expected []");
  }
  Tensor scale = tensor_of(t.dtype, t.shape, t.bytes);
  const Tensor unit = unit_scale(dtype);
  if (scale.dtype == dtype && scale.shape.empty() && scale.bytes == unit.bytes) return std::nullopt;
  return scale;
}

Source source_of(const std::string& prefix, const TensorLookup& lookup, const LayerFacts& facts) {
  Source s{prefix, lookup, parse_layer_settings(facts.settings, prefix), {}};
  // What was written beside the tensors is about them; the caller may only have worked it out.
  s.shape = s.settings.weight_shape.empty() ? facts.weight_shape : s.settings.weight_shape;
  if (s.shape.empty()) return s;
  if (s.shape.size() != 2 || s.shape[0] < 1 || s.shape[1] < 1) {
    fail(Errc::kUnsupported, std::string(kWhere) + ": weight of " + prefix + " has shape " +
                                 shape_string(s.shape) + ", expected [out, in] of a linear layer");
  }
  return s;
}

/// Spec with the residue's bytes appended to the buffers that will be made from it.
PackedMatrix make_with_residue(PackedSpec spec, const Flags& flags, const Residue& residue) {
  const std::vector<std::uint8_t> kept = residue.encode();
  spec.dialect_flags = flags.to_int();
  spec.residue_bytes = static_cast<std::int64_t>(kept.size());
  PackedMatrix w = make_packed(spec);
  std::copy(kept.begin(), kept.end(), w.shared.end() - static_cast<std::ptrdiff_t>(kept.size()));
  return w;
}

PackedMatrix import_bytes(const Source& s, PackedSpec spec, Flags flags, Residue residue) {
  constexpr std::array<DType, 3> kBytes = {DType::kI8, DType::kF8E4M3, DType::kF8E5M2};
  const TensorView& data = s.get("weight._data", kBytes);
  const TensorView& scale = s.get("weight._scale", kFloats);
  require_two_dimensions(s, "weight._data", data);
  read_bytes_form(s, data, scale, spec, flags);
  const GroupNumbers numbers = read_group_numbers(s, spec, flags, scale, nullptr);
  std::vector<std::uint8_t> codes(data.bytes.begin(), data.bytes.end());
  if (data.dtype == DType::kI8) {
    for (std::uint8_t& code : codes) code ^= kInt8Centre;
  }
  clear_zero_scales(spec, numbers, codes, flags, residue);
  PackedMatrix w = make_with_residue(spec, flags, residue);
  const PackedLayout layout = layout_of(w.spec);
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    pack_row(8, codes.data() + r * spec.cols, spec.cols, w.codes.data() + r * layout.code_bytes);
  }
  write_numbers(numbers, w);
  return w;
}

PackedMatrix import_packed(const Source& s, PackedSpec spec, Flags flags, Residue residue) {
  constexpr std::array<DType, 1> kPacked = {DType::kU8};
  const TensorView& data = s.get("weight._data._data", kPacked);
  const TensorView& scale = s.get("weight._scale", kFloats);
  const std::array<DType, 2> shifts = {scale.dtype, DType::kU8};
  const TensorView& shift = s.get("weight._shift", shifts);
  require_two_dimensions(s, "weight._data._data", data);
  if (shift.shape != scale.shape) {
    s.refuse(Errc::kShape, "weight._shift",
             "has shape " + shape_string(shift.shape) + ", expected that of weight._scale, " +
                 shape_string(scale.shape));
  }
  flags.zero_point = shift.dtype == DType::kU8;
  flags.optimize = s.settings.optimize;
  spec.offset = flags.zero_point ? Offset::kZeroPoint : Offset::kShift;
  read_grouping(s, data, scale, spec, flags);
  const GroupNumbers numbers = read_group_numbers(s, spec, flags, scale, &shift);
  spec.dialect_flags = flags.to_int();
  PackedMatrix w = make_packed(spec);
  residue.pad = unpack_codes(data.bytes, w);
  PackedMatrix out = make_with_residue(spec, flags, residue);
  out.codes = std::move(w.codes);
  write_numbers(numbers, out);
  return out;
}

}  // namespace

std::vector<std::vector<std::int64_t>> possible_shapes(std::int64_t grouped_rows,
                                                       std::int64_t grouped_cols,
                                                       std::int64_t bias) {
  std::vector<std::vector<std::int64_t>> out;
  const bool a_group = upstream_group_size(grouped_cols) == 0 && grouped_cols % 32 == 0;
  for (std::int64_t k = 1; k <= grouped_rows && out.size() < 2; ++k) {
    if (grouped_rows % k != 0 || (bias != 0 && grouped_rows / k != bias)) continue;
    if (k > 1 && (!a_group || upstream_group_size(grouped_cols * k) != grouped_cols)) continue;
    out.push_back({grouped_rows / k, grouped_cols * k});
    if (!a_group) break;
  }
  return out;
}

PackedMatrix import_layer(const std::string& prefix, const TensorLookup& lookup,
                          const LayerFacts& facts) {
  const Source s = source_of(prefix, lookup, facts);
  if (s.settings.weights == QType::kFloat8E4M3Fnuz) {
    fail(Errc::kUnsupported,
         std::string(kWhere) + ": weights of " + prefix +
             " are qfloat8_e4m3fnuz, expected one of qint2, qint4, qint8, qfloat8_e4m3fn, "
             "qfloat8_e5m2");
  }
  const TensorView& scale = s.get("weight._scale", kFloats);
  Flags flags{.activations = s.settings.activations};
  Residue residue;
  residue.input_scale = activation_scale(s, "input_scale", scale.dtype, flags.no_input_scale);
  residue.output_scale = activation_scale(s, "output_scale", scale.dtype, flags.no_output_scale);
  PackedSpec spec;
  spec.dialect = kDialectId;
  spec.scale = scale_source_of(scale.dtype);
  spec.value_dtype = scale.dtype;
  if (s.find("weight._data._data") != nullptr) {
    return import_packed(s, spec, flags, std::move(residue));
  }
  return import_bytes(s, spec, flags, std::move(residue));
}

}  // namespace quantal::quanto

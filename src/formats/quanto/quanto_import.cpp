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

/// Zero points are codes.
void check_zero_points(const Source& s, const TensorView& shift, int bits) {
  for (const std::uint8_t zero : shift.bytes) {
    if (zero < 1 << bits) continue;
    s.refuse(Errc::kCorrupt, "weight._shift",
             "holds the zero point " + std::to_string(zero) + ", expected at most " +
                 std::to_string((1 << bits) - 1));
  }
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

/// Values of a float8 layer's codes.
const std::array<float, 256>& float8_values(const PackedSpec& spec) {
  return spec.code_map == CodeMap::kE4M3 ? kE4M3Values : kE5M2Values;
}

/// Which rows (or columns, for statistics along them) of a float8 layer have scale 0; empty if
/// none.
std::vector<bool> zero_scales(const PackedSpec& spec, const Flags& flags, const TensorView& scale) {
  if (spec.code_map == CodeMap::kInteger) return {};
  std::vector<float> scales(static_cast<std::size_t>(scale.numel()));
  widen_to_f32(scale.dtype, scale.bytes.data(), scale.numel(), scales.data());
  const auto zero = [](float s) { return s == 0.0F; };
  if (std::none_of(scales.begin(), scales.end(), zero)) return {};
  std::vector<bool> out(static_cast<std::size_t>(flags.per_tensor ? spec.rows : scale.numel()));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = zero(scales[flags.per_tensor ? 0 : i]);
  return out;
}

/// True for the weights of row r and column c whose scale is 0.
bool scale_is_zero(const PackedSpec& spec, const std::vector<bool>& zero, std::int64_t r,
                   std::int64_t c) {
  const bool columns = spec.group_map == GroupMap::kColumnBlocks;
  return !zero.empty() && zero[static_cast<std::size_t>(columns ? c : r)];
}

/// Float8 weights of scale 0 are NaN upstream (0 / 0); they become 0 here. Sets nan_rows if all of
/// them are kUpstreamNan, else keeps their bytes.
void keep_zero_scale_codes(const PackedSpec& spec, const std::vector<bool>& zero,
                           std::span<const std::uint8_t> codes, Flags& flags, Residue& residue) {
  if (zero.empty()) return;
  const std::array<float, 256>& values = float8_values(spec);
  const bool columns = spec.group_map == GroupMap::kColumnBlocks;
  std::vector<std::uint8_t> original;
  bool any_nan = false, all_upstream = true;
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    if (!columns && !scale_is_zero(spec, zero, r, 0)) continue;
    for (std::int64_t c = 0; c < spec.cols; ++c) {
      if (!scale_is_zero(spec, zero, r, c)) continue;
      const std::uint8_t code = codes[static_cast<std::size_t>(r * spec.cols + c)];
      original.push_back(code);
      all_upstream = all_upstream && code == kUpstreamNan;
      any_nan = any_nan || !std::isfinite(values[code]);
    }
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

/// A layer of this form whose `shared` is the residue.
StoredLayer layer_with_residue(PackedSpec spec, const Flags& flags, const Residue& residue) {
  StoredLayer layer;
  layer.shared = residue.encode();
  layer.spec = spec;
  layer.spec.dialect_flags = flags.to_int();
  layer.spec.residue_bytes = static_cast<std::int64_t>(layer.shared.size());
  return layer;
}

StoredLayer open_bytes(const Source& s, PackedSpec spec, Flags flags, Residue residue) {
  constexpr std::array<DType, 3> kBytes = {DType::kI8, DType::kF8E4M3, DType::kF8E5M2};
  const TensorView& data = s.get("weight._data", kBytes);
  const TensorView& scale = s.get("weight._scale", kFloats);
  require_two_dimensions(s, "weight._data", data);
  read_bytes_form(s, data, scale, spec, flags);
  std::vector<bool> zero = zero_scales(spec, flags, scale);
  keep_zero_scale_codes(spec, zero, data.bytes, flags, residue);
  StoredLayer layer = layer_with_residue(spec, flags, residue);
  layer.spec_from_values = spec.code_map != CodeMap::kInteger;
  const std::uint8_t flip = data.dtype == DType::kI8 ? kInt8Centre : 0;
  layer.read_codes = [spec = layer.spec, bytes = data.bytes, zero = std::move(zero), flip](
                         RowRange rows, std::uint8_t* out) {
    pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* codes) {
      const std::uint8_t* in = bytes.data() + r * spec.cols;
      for (std::int64_t c = 0; c < spec.cols; ++c) {
        codes[c] = static_cast<std::uint8_t>(in[c] ^ flip);
      }
      for (std::int64_t c = 0; c < spec.cols && !zero.empty(); ++c) {
        if (!scale_is_zero(spec, zero, r, c)) continue;
        if (!std::isfinite(float8_values(spec)[codes[c]])) codes[c] = 0;
      }
    });
  };
  const StoredNumbers numbers{.scales = scale.bytes, .one = flags.per_tensor};
  layer.read_stats = [spec = layer.spec, numbers](RowRange rows, std::uint8_t* out) {
    write_numbers(numbers, spec, rows, out);
  };
  return layer;
}

StoredLayer open_packed(const Source& s, PackedSpec spec, Flags flags, Residue residue) {
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
  if (flags.zero_point) check_zero_points(s, shift, spec.bits);
  residue.pad = pad_codes(data.bytes, spec);
  StoredLayer layer = layer_with_residue(spec, flags, residue);
  layer.spec_from_values = has_pad(spec);
  layer.read_codes = [spec = layer.spec, bytes = data.bytes](RowRange rows, std::uint8_t* out) {
    unpack_codes(bytes, spec, rows, out);
  };
  const StoredNumbers numbers{.scales = scale.bytes,
                              .offsets = shift.bytes,
                              .one = flags.per_tensor,
                              .codes = flags.zero_point};
  layer.read_stats = [spec = layer.spec, numbers](RowRange rows, std::uint8_t* out) {
    write_numbers(numbers, spec, rows, out);
  };
  return layer;
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

StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
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
    return open_packed(s, spec, flags, std::move(residue));
  }
  return open_bytes(s, spec, flags, std::move(residue));
}

}  // namespace quantal::quanto

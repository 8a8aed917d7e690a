#include "formats/hqq/hqq_meta.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "formats/hqq/hqq_codec.h"
#include "formats/hqq/hqq_packing.h"
#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

std::string joined(std::string_view a, std::string_view b, std::string_view c = "") {
  return std::string(a).append(b).append(c);
}

/// What a nested dictionary may hold, and what each value is in Python.
struct NestedField {
  std::string_view name;
  StateKind kind;
};
constexpr std::array<NestedField, 10> kNestedFields = {{
    {"nbits", StateKind::kInt},
    {"group_size", StateKind::kInt},
    {"shape", StateKind::kSize},
    {"scale", StateKind::kTensor},
    {"zero", StateKind::kTensor},
    {"axis", StateKind::kInt},
    {"packing", StateKind::kText},
    {"unpack_view_dtype", StateKind::kDtype},
    {"view_as_float", StateKind::kBool},
    {"compute_dtype", StateKind::kDtype},
}};

Tensor copy_of(const TensorView& t) { return tensor_of(t.dtype, t.shape, t.bytes); }

const TensorView& float_parameter(const Fields& fields, std::string_view field, DType dtype) {
  const std::array<DType, 1> allowed = {dtype};
  const TensorView& t = fields.tensor(field);
  require_dtype(t, fields.name(field), kWhere, allowed);
  return t;
}

std::vector<float> widened(const TensorView& t) {
  std::vector<float> out(static_cast<std::size_t>(t.numel()));
  widen_to_f32(t.dtype, t.bytes.data(), t.numel(), out.data());
  return out;
}

void round_all(DType dtype, std::vector<float>& values) {
  std::vector<std::uint8_t> narrow(values.size() * dtype_size(dtype));
  const auto n = static_cast<std::int64_t>(values.size());
  narrow_from_f32(dtype, values.data(), n, narrow.data());
  widen_to_f32(dtype, narrow.data(), n, values.data());
}

/// Codes of `n` parameters, in flat order, as float32.
std::vector<float> meta_codes(const TensorView& codes, const std::string& name, const Fields& meta,
                              std::int64_t n) {
  const std::int64_t bits = meta.integer("nbits");
  if (std::find(kBits.begin(), kBits.end(), bits) == kBits.end()) {
    meta.refuse(Errc::kUnsupported, "nbits", std::to_string(bits), "one of 1, 2, 3, 4, 5, 6, 8");
  }
  const std::int64_t cols = codes.shape.empty() ? 1 : codes.shape.back();
  const Packing packing = [&] {
    Packing p = packing_of(static_cast<int>(bits), {n, 1, n}, kWhere);
    p.cols = std::max<std::int64_t>(1, cols);
    p.rows = codes.numel() / p.cols;
    return p;
  }();
  const std::array<DType, 1> allowed = {packing.word};
  require_dtype(codes, name, kWhere, allowed);
  const std::int64_t held = checked_mul(packing.words(), packing.parts, name);
  const std::int64_t spare = packing.word == DType::kI32 ? 10 * packing.cols : 1;
  if (held < n || held - n >= spare) {
    fail(
        Errc::kShape,
        "hqq: " + name + " holds " + std::to_string(held) + " codes, expected " + std::to_string(n),
        {.path = {}, .tensor = name});
  }
  std::vector<float> out(static_cast<std::size_t>(n));
  const std::uint32_t mask = (1U << packing.bits) - 1;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t word = i % packing.words(), part = i / packing.words();
    std::uint32_t bytes = codes.bytes[static_cast<std::size_t>(word)];
    if (packing.word == DType::kI32) std::memcpy(&bytes, codes.bytes.data() + 4 * word, 4);
    out[static_cast<std::size_t>(i)] = static_cast<float>(bytes >> packing.shift(part) & mask);
  }
  return out;
}

/// `r(r(code - zero) * scale)` for each parameter; r rounds to `dtype`.
std::vector<float> decode_meta(const TensorView& codes, const std::string& name, const Fields& meta,
                               std::int64_t n, DType dtype) {
  const std::vector<std::int64_t> shape = meta.sizes("shape");
  if (checked_numel(shape, "hqq: shape") != n) {
    meta.refuse(Errc::kShape, "shape", shape_string(shape), std::to_string(n) + " elements");
  }
  if (meta.has("compute_dtype") && meta.dtype("compute_dtype") != dtype) {
    meta.refuse(Errc::kUnsupported, "compute_dtype", "'" + meta.text("compute_dtype") + "'",
                "the layer's, torch." + std::string(dtype_torch_name(dtype)));
  }
  if (meta.flag("view_as_float", false)) {
    meta.refuse(Errc::kUnsupported, "view_as_float", "true", "false in a nested dictionary");
  }
  const std::int64_t axis = meta.integer("axis");
  if (axis != 0 && axis != 1) meta.refuse(Errc::kCorrupt, "axis", std::to_string(axis), "0 or 1");
  const std::vector<float> scale = widened(float_parameter(meta, "scale", dtype));
  const std::vector<float> zero = widened(float_parameter(meta, "zero", dtype));
  const auto count = static_cast<std::int64_t>(scale.size());
  if (count == 0 || n % count != 0) {
    meta.refuse(Errc::kShape, "scale", std::to_string(count) + " elements",
                "a divisor of the " + std::to_string(n) + " parameters");
  }
  require_numel(meta.tensor("zero"), meta.name("zero"), kWhere, count);
  std::vector<float> values = meta_codes(codes, name, meta, n);
  const auto group_of = [&](std::size_t i) {
    const auto flat = static_cast<std::int64_t>(i);
    return static_cast<std::size_t>(axis == 1 ? flat / (n / count) : flat % count);
  };
  for (std::size_t i = 0; i < values.size(); ++i) values[i] -= zero[group_of(i)];
  round_all(dtype, values);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] *= scale[group_of(i)];
  round_all(dtype, values);
  return values;
}

/// One half of `zero_scale` [2, ...].
TensorView half_of(const TensorView& stacked, std::size_t half) {
  TensorView out = stacked;
  out.shape.erase(out.shape.begin());
  const std::size_t bytes = stacked.bytes.size() / 2;
  out.bytes = stacked.bytes.subspan(half * bytes, bytes);
  return out;
}

/// scale or zero from fields or from its half of `stacked`.
ParameterBytes open_parameter(const Fields& fields, std::string_view what,
                              const TensorView* stacked, DType dtype, std::int64_t groups,
                              bool quantized, std::vector<NamedTensor>& residue) {
  const std::string field = quantized ? joined(what, "_q") : std::string(what);
  const std::string name = fields.name(stacked != nullptr ? "zero_scale" : field);
  const TensorView stored = stacked != nullptr ? *stacked : fields.tensor(field);
  if (!quantized) {
    const std::array<DType, 1> allowed = {dtype};
    require_dtype(stored, name, kWhere, allowed);
    require_numel(stored, name, kWhere, groups);
    return {stored.bytes, nullptr};
  }
  const std::string dictionary = joined("meta_", what);
  const Fields meta = fields.nested(dictionary);
  const std::vector<float> values = decode_meta(stored, name, meta, groups, dtype);
  residue.push_back({field, copy_of(stored), StateKind::kTensor});
  for (const NestedField& f : kNestedFields) {
    const std::string full = joined(dictionary, ".", f.name);
    if (meta.given(f.name)) {
      const bool fraction = f.kind == StateKind::kInt && meta.tensor(f.name).dtype == DType::kF32;
      residue.push_back(
          {full, copy_of(meta.tensor(f.name)), fraction ? StateKind::kFloat : f.kind});
    } else if (f.name == "group_size" || f.name == "packing") {
      residue.push_back(named_none(full));
    }
  }
  const auto raw = std::make_shared<std::vector<std::uint8_t>>(values.size() * dtype_size(dtype));
  narrow_from_f32(dtype, values.data(), groups, raw->data());
  return {*raw, raw};
}

NamedTensor& field_named(std::span<NamedTensor> fields, const std::string& name) {
  return *std::find_if(fields.begin(), fields.end(),
                       [&](const NamedTensor& f) { return f.name == name; });
}

}  // namespace

std::vector<std::int64_t> parameter_shape(const PackedSpec& spec) {
  const Flags flags = Flags::from_int(spec.dialect_flags);
  if (!flags.channel_wise) return {};
  const std::int64_t groups = grouping_of(spec).groups;
  if (spec.group_map == GroupMap::kColumnRuns) return {1, groups};
  return {groups, 1};
}

OpenParameters open_parameters(const Fields& fields, DType value_dtype, std::int64_t groups,
                               Flags& flags, std::vector<NamedTensor>& residue) {
  flags.quant_zero = fields.flag("quant_zero", false);
  flags.quant_scale = fields.flag("quant_scale", false);
  flags.stacked = fields.has("zero_scale");
  TensorView zero_half, scale_half;
  if (flags.stacked) {
    const std::array<DType, 2> allowed = {DType::kU8, value_dtype};
    const TensorView& both = fields.tensor("zero_scale");
    require_dtype(both, fields.name("zero_scale"), kWhere, allowed);
    if (both.shape.empty() || both.shape[0] != 2) {
      fields.refuse(Errc::kShape, "zero_scale", shape_string(both.shape), "[2, ...]");
    }
    const bool codes = both.dtype == DType::kU8;
    if (flags.quant_zero != codes || flags.quant_scale != codes) {
      fields.refuse(Errc::kCorrupt, "zero_scale", std::string(dtype_name(both.dtype)),
                    "u8 exactly if both zero and scale are quantized");
    }
    zero_half = half_of(both, 0);
    scale_half = half_of(both, 1);
  }
  OpenParameters out;
  out.scales = open_parameter(fields, "scale", flags.stacked ? &scale_half : nullptr, value_dtype,
                              groups, flags.quant_scale, residue);
  out.zeros = open_parameter(fields, "zero", flags.stacked ? &zero_half : nullptr, value_dtype,
                             groups, flags.quant_zero, residue);
  return out;
}

void write_parameters(const PackedSpec& spec, const OpenParameters& parameters, RowRange rows,
                      std::uint8_t* stats, const Executor& executor) {
  const std::size_t item = dtype_size(spec.value_dtype);
  const std::uint8_t* scales = parameters.scales.bytes.data();
  const std::uint8_t* zeros = parameters.zeros.bytes.data();
  if (spec.group_map == GroupMap::kRowRuns && Flags::from_int(spec.dialect_flags).channel_wise) {
    spread_rows(spec, {.scales = scales, .offsets = zeros}, rows, stats, executor);
    return;
  }
  // A column's pair, or the one pair for every row.
  const bool columns = spec.group_map == GroupMap::kColumnRuns;
  if (columns) {
    const auto from = static_cast<std::size_t>(rows.begin) * item;
    interleave(item, rows.size(), scales + from, zeros + from, stats, executor);
    return;
  }
  const std::int64_t stat_bytes = layout_of(spec).stat_bytes;
  for (std::int64_t i = rows.begin; i < rows.end; ++i, stats += stat_bytes) {
    std::memcpy(stats, scales, item);
    std::memcpy(stats + item, zeros, item);
  }
}

StoredParameters parameters_of(const PackedView& w) {
  const std::size_t item = dtype_size(w.spec.value_dtype);
  StoredParameters out;
  if (w.spec.group_map == GroupMap::kRowRuns) {
    GatheredStats stats = gather_stats(w);
    out = {std::move(stats.scales), std::move(stats.offsets)};
  } else {
    for (std::size_t i = 0; i < w.stats.size(); i += 2 * item) {
      const std::uint8_t* pair = w.stats.data() + i;
      out.scales.insert(out.scales.end(), pair, pair + item);
      out.zeros.insert(out.zeros.end(), pair + item, pair + 2 * item);
    }
  }
  if (Flags::from_int(w.spec.dialect_flags).channel_wise) return out;
  for (std::vector<std::uint8_t>* values : {&out.scales, &out.zeros}) {
    for (std::size_t i = item; i < values->size(); i += item) {
      if (std::memcmp(values->data(), values->data() + i, item) != 0) {
        fail(Errc::kCorrupt, "hqq: row " + std::to_string(i / item) +
                                 " has statistics of its own, expected one scale for the matrix "
                                 "(channel_wise false)");
      }
    }
    values->resize(std::min(values->size(), item));
  }
  return out;
}

void append_parameters(const PackedSpec& spec, StoredParameters parameters,
                       std::span<const NamedTensor> residue, std::vector<NamedTensor>& out) {
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const std::size_t first = out.size();
  if (!flags.quant_scale) {
    out.push_back(
        {"scale", {spec.value_dtype, parameter_shape(spec), std::move(parameters.scales)}});
  }
  if (!flags.quant_zero) {
    out.push_back({"zero", {spec.value_dtype, parameter_shape(spec), std::move(parameters.zeros)}});
  }
  for (const NamedTensor& field : residue) {
    if (field.name != kStrayBits) out.push_back(field);
  }
  if (flags.stacked) {
    const std::span<NamedTensor> added(out.data() + first, out.size() - first);
    NamedTensor both = field_named(added, flags.quant_zero ? "zero_q" : "zero");
    const Tensor& scale = field_named(added, flags.quant_scale ? "scale_q" : "scale").tensor;
    both.name = "zero_scale";
    both.tensor.shape.insert(both.tensor.shape.begin(), 2);
    both.tensor.bytes.insert(both.tensor.bytes.end(), scale.bytes.begin(), scale.bytes.end());
    const auto halves = [](const NamedTensor& f) {
      return f.name == "zero" || f.name == "scale" || f.name == "zero_q" || f.name == "scale_q";
    };
    out.erase(std::remove_if(out.begin() + static_cast<std::ptrdiff_t>(first), out.end(), halves),
              out.end());
    out.push_back(std::move(both));
  }
}

// ------------------------------------------------------------------ quantizing

std::vector<NamedTensor> blank_meta(std::string_view what, const PackedSpec& spec,
                                    std::int64_t group_size) {
  const std::vector<std::int64_t> shape = parameter_shape(spec);
  const std::int64_t groups = grouping_of(spec).groups;
  if (group_size != 0 && groups % group_size != 0) {
    fail(Errc::kConfig, "hqq: quant_" + std::string(what) + " with " + std::to_string(groups) +
                            " groups, expected a multiple of " + std::to_string(group_size));
  }
  const std::string meta = joined("meta_", what, ".");
  const bool whole = group_size == 0;
  const std::int64_t count = whole ? 1 : groups / group_size;
  const std::vector<std::int64_t> inner =
      whole ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{1, count};
  std::vector<NamedTensor> fields;
  fields.push_back(
      {joined(what, "_q"),
       make_tensor(DType::kU8, whole ? shape : std::vector<std::int64_t>{group_size, count}),
       StateKind::kTensor});
  fields.push_back(named_int(meta + "nbits", kMetaBits));
  fields.push_back(whole ? named_none(meta + "group_size")
                         : named_int(meta + "group_size", group_size));
  fields.push_back(named_size(meta + "shape", shape));
  fields.push_back({meta + "scale", make_tensor(spec.value_dtype, inner), StateKind::kTensor});
  fields.push_back({meta + "zero", make_tensor(spec.value_dtype, inner), StateKind::kTensor});
  fields.push_back(named_int(meta + "axis", 0));
  fields.push_back(named_text(meta + "packing", packing_name(kMetaBits)));
  fields.push_back(named_dtype(meta + "unpack_view_dtype", DType::kU8));
  fields.push_back(named_bool(meta + "view_as_float", false));
  fields.push_back(named_dtype(meta + "compute_dtype", spec.value_dtype));
  return fields;
}

void quantize_parameters(std::string_view what, const PackedSpec& spec, std::int64_t group_size,
                         std::span<float> values, std::span<NamedTensor> fields) {
  constexpr float kMaxCode = (1 << kMetaBits) - 1;
  const QuantizeKernels& k = quantize_kernels();
  const auto n = static_cast<std::int64_t>(values.size());
  if (n == 0) return;
  const std::int64_t count = group_size == 0 ? 1 : n / group_size;
  std::vector<float> scale(static_cast<std::size_t>(count)), zero(scale.size());
  std::vector<float> low(scale.size()), high(scale.size());
  if (group_size == 0) {
    const Range r = k.range({DType::kF32, values.data()}, n);
    low[0] = r.low;
    high[0] = r.high;
  }
  for (std::int64_t j = 0; group_size != 0 && j < count; j += kColumnBlock) {
    const auto at = static_cast<std::size_t>(j);
    k.range_columns({DType::kF32, values.data() + j}, group_size, count,
                    std::min(kColumnBlock, count - j), low.data() + at, high.data() + at);
  }
  for (std::size_t j = 0; j < scale.size(); ++j) {
    const InitialCode code = initial_code(low[j], high[j], kMaxCode, false);
    scale[j] = code.scale;
    zero[j] = code.zero;
  }
  Tensor& codes = field_named(fields, joined(what, "_q")).tensor;
  for (std::int64_t at = 0; at < n; at += group_size == 0 ? n : count) {
    const WeightRun run = {DType::kF32, values.data() + at};
    if (group_size == 0) {
      k.encode_affine(run, n, {scale[0], zero[0], kMaxCode}, codes.bytes.data());
    } else {
      k.encode_affine_each(run, count, scale.data(), zero.data(), kMaxCode,
                           codes.bytes.data() + at);
    }
  }
  for (float& s : scale) s = 1.0F / s;
  const std::string meta = joined("meta_", what, ".");
  narrow_from_f32(spec.value_dtype, scale.data(), count,
                  field_named(fields, meta + "scale").tensor.bytes.data());
  narrow_from_f32(spec.value_dtype, zero.data(), count,
                  field_named(fields, meta + "zero").tensor.bytes.data());

  std::vector<TensorView> views;
  for (const NamedTensor& f : fields) views.push_back(f.tensor.view());
  const TensorLookup lookup = [&](const std::string& name) -> const TensorView* {
    for (std::size_t i = 0; i < views.size(); ++i) {
      if (fields[i].name == name) return &views[i];
    }
    return nullptr;
  };
  std::ranges::copy(
      decode_meta(codes.view(), joined(what, "_q"), Fields(meta, lookup), n, spec.value_dtype),
      values.begin());
}

}  // namespace quantal::hqq

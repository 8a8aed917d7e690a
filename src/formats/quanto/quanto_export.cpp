// Tensors of a layer (optimum-quanto 0.2.7), names after `<module>.`:
//
//   weight._data           8-bit types: int8, float8 e4m3 or e5m2 [out, in]
//   weight._data._data     2 and 4 bits: uint8, see pack_codes
//   weight._scale          value_dtype: [groups, 1] (axis 0), [1, groups] (axis -1), [] (per
//   tensor) weight._shift          2 and 4 bits: the same shape in value_dtype, or uint8 in codes
//   input_scale, output_scale   value_dtype []
#include <cstring>

#include "formats/quanto/quanto_checkpoint.h"
#include "formats/quanto/quanto_pack.h"
#include "formats/tensors.h"

namespace quantal::quanto {
namespace {

DType byte_dtype(const PackedSpec& spec) {
  if (spec.code_map == CodeMap::kE4M3) return DType::kF8E4M3;
  return spec.code_map == CodeMap::kE5M2 ? DType::kF8E5M2 : DType::kI8;
}

/// One byte per weight of the 8-bit types; int8 is stored with kInt8Centre added.
Tensor byte_codes(const PackedView& w) {
  const PackedLayout layout = layout_of(w.spec);
  Tensor out = make_tensor(byte_dtype(w.spec), {w.spec.rows, w.spec.cols});
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    unpack_row(8, w.codes.data() + r * layout.code_bytes, w.spec.cols,
               out.bytes.data() + r * w.spec.cols);
  }
  if (out.dtype != DType::kI8) return out;
  for (std::uint8_t& code : out.bytes) code ^= kInt8Centre;
  return out;
}

/// Puts back what float8 weights of scale 0 held upstream.
void restore_zero_scales(const PackedSpec& spec, const Flags& flags, const Residue& residue,
                         const GroupNumbers& numbers, std::vector<std::uint8_t>& codes) {
  if (!flags.nan_rows && residue.zero_scale_codes.empty()) return;
  const bool columns = spec.group_map == GroupMap::kColumnBlocks;
  std::vector<float> scales(numbers.scales.size() / dtype_size(spec.value_dtype));
  widen_to_f32(spec.value_dtype, numbers.scales.data(), static_cast<std::int64_t>(scales.size()),
               scales.data());
  std::size_t next = 0;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const auto cols = static_cast<std::size_t>(spec.cols);
    if (scales[columns ? i % cols : i / cols] != 0.0F) continue;
    codes[i] = flags.nan_rows                           ? kUpstreamNan
               : next < residue.zero_scale_codes.size() ? residue.zero_scale_codes[next]
                                                        : codes[i];
    ++next;
  }
}

Tensor scale_tensor(const PackedSpec& spec, std::vector<std::int64_t> shape,
                    std::vector<std::uint8_t> bytes) {
  return {spec.value_dtype, std::move(shape), std::move(bytes)};
}

/// Zero points as the bytes that upstream stores.
Tensor zero_points(const PackedSpec& spec, const std::vector<std::int64_t>& shape,
                   const std::vector<std::uint8_t>& raw) {
  Tensor out = make_tensor(DType::kU8, shape);
  std::vector<float> values(out.bytes.size());
  widen_to_f32(spec.value_dtype, raw.data(), static_cast<std::int64_t>(values.size()),
               values.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!(values[i] >= 0.0F && values[i] <= 255.0F)) {
      fail(Errc::kCorrupt, "quanto: zero point of group " + std::to_string(i) + " is " +
                               std::to_string(values[i]) + ", expected 0 .. 255");
    }
    out.bytes[i] = static_cast<std::uint8_t>(values[i]);
  }
  return out;
}

/// The one scale of a per-tensor layer; every row must hold it.
void collapse(std::vector<std::uint8_t>& numbers, std::size_t item) {
  for (std::size_t i = item; i < numbers.size(); i += item) {
    if (std::memcmp(numbers.data() + i, numbers.data(), item) == 0) continue;
    fail(Errc::kCorrupt, "quanto: scale of row " + std::to_string(i / item) +
                             " differs from row 0, expected one scale for the whole tensor");
  }
  numbers.resize(std::min(numbers.size(), item));
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const Flags flags = Flags::from_int(spec.dialect_flags);
  const Residue residue = Residue::decode(residue_of(w));
  GroupNumbers numbers = read_numbers(w);
  std::vector<NamedTensor> out;
  const auto add = [&](std::string_view field, Tensor tensor) {
    out.push_back({prefix + std::string(field), std::move(tensor)});
  };
  if (spec.bits == 8) {
    Tensor codes = byte_codes(w);
    restore_zero_scales(spec, flags, residue, numbers, codes.bytes);
    add("weight._data", std::move(codes));
  } else {
    const Grouped g = grouped_of(spec);
    add("weight._data._data",
        Tensor{DType::kU8, {g.packed_rows, g.cols}, pack_codes(w, residue.pad)});
  }
  const std::size_t item = dtype_size(spec.value_dtype);
  std::vector<std::int64_t> shape;
  if (flags.per_tensor) {
    collapse(numbers.scales, item);
    if (!numbers.offsets.empty()) collapse(numbers.offsets, item);
  } else {
    const auto groups = static_cast<std::int64_t>(numbers.scales.size() / item);
    const bool columns =
        spec.bits == 8 ? spec.group_map == GroupMap::kColumnBlocks : grouped_of(spec).columns;
    shape = columns ? std::vector<std::int64_t>{1, groups} : std::vector<std::int64_t>{groups, 1};
  }
  add("weight._scale", scale_tensor(spec, shape, std::move(numbers.scales)));
  if (flags.zero_point) {
    add("weight._shift", zero_points(spec, shape, numbers.offsets));
  } else if (stores_offsets(spec.offset)) {
    add("weight._shift", scale_tensor(spec, shape, std::move(numbers.offsets)));
  }
  if (!flags.no_input_scale) {
    add("input_scale", residue.input_scale.value_or(unit_scale(spec.value_dtype)));
  }
  if (!flags.no_output_scale) {
    add("output_scale", residue.output_scale.value_or(unit_scale(spec.value_dtype)));
  }
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  return has("weight._scale") && (has("weight._data") || has("weight._data._data"));
}

}  // namespace quantal::quanto

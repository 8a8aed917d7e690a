#include <cmath>
#include <cstring>

#include "core/half.h"
#include "kernels/ref/floats.h"
#include "kernels/ref/ref.h"

namespace quantal::ref {
namespace {

float read_f32(const std::uint8_t* p) {
  float v = 0;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

float read_f16(const std::uint8_t* p) {
  std::uint16_t h = 0;
  std::memcpy(&h, p, sizeof(h));
  return f16_to_f32(h);
}

/// A scale or offset that stands for itself. One-byte floats are rounded to the value type.
float read_plain(const PackedSpec& spec, const std::uint8_t* p) {
  if (spec.scale == ScaleSource::kF32) return read_f32(p);
  if (spec.scale == ScaleSource::kF16) return read_f16(p);
  if (spec.scale == ScaleSource::kE8M0) {
    return round_to(spec.value_dtype, std::ldexp(1.0F, static_cast<int>(*p) - 127));
  }
  if (spec.scale == ScaleSource::kE4M3) return round_to(spec.value_dtype, kE4M3Values[*p]);
  std::uint16_t h = 0;
  std::memcpy(&h, p, sizeof(h));
  return bf16_to_f32(h);
}

/// Bits of a column in one plane of `bits` bits that begins at `plane`; `col` counts from the
/// plane's first code. Strips of 16 bytes, byte j, field f: code 16 f + j.
unsigned plane_bits(const std::uint8_t* plane, int bits, std::int64_t col) {
  const std::int64_t strip_codes = 128 / bits;
  const std::int64_t in_strip = col % strip_codes;
  const unsigned byte = plane[col / strip_codes * 16 + in_strip % 16];
  return (byte >> (bits * static_cast<int>(in_strip / 16))) & ((1U << bits) - 1U);
}

unsigned code_at(const PackedView& w, const PackedLayout& layout, std::int64_t row,
                 std::int64_t col) {
  const int bits = w.spec.bits;
  const std::int64_t codes = unit_codes(bits);
  const std::uint8_t* unit =
      w.codes.data() + row * layout.code_bytes + col / codes * unit_bytes(bits);
  const std::int64_t c = col % codes;
  if (bits == 3) return plane_bits(unit, 2, c) | plane_bits(unit + 32, 1, c) << 2;
  if (bits == 5) return plane_bits(unit, 4, c) | plane_bits(unit + 64, 1, c) << 4;
  if (bits == 6) return plane_bits(unit, 4, c) | plane_bits(unit + 32, 2, c) << 4;
  return plane_bits(unit, bits, c);
}

float mapped(const PackedView& w, unsigned code) {
  switch (w.spec.code_map) {
    case CodeMap::kInteger:
      return static_cast<float>(static_cast<int>(code) - w.spec.centre);
    case CodeMap::kNf4:
      return kNf4Codebook[code];
    case CodeMap::kFp4:
      return kFp4Codebook[code];
    case CodeMap::kTable:
      return read_f32(w.shared.data() + 4 * code);
    case CodeMap::kE2M1:
      return kE2M1Codebook[code];
    case CodeMap::kIq4Nl:
      return kIq4NlCodebook[code];
    case CodeMap::kE4M3:
      return kE4M3Values[code];
    case CodeMap::kE5M2:
      return kE5M2Values[code];
  }
  return 0;
}

struct ScaleOffset {
  float scale = 0, offset = 0;
};

ScaleOffset nested_scale(const PackedView& w, const PackedLayout& layout, const std::uint8_t* stats,
                         std::int64_t slot, std::int64_t nested_phase) {
  const std::uint8_t* shared = w.shared.data() + (w.spec.code_map == CodeMap::kTable ? 64 : 0);
  const std::int64_t block = (nested_phase + slot) / w.spec.nested_group_size;
  const float offset = read_f32(shared);
  const float map = read_f32(shared + 4 + 4 * stats[slot]);
  const float absmax2 = read_f32(stats + layout.slots + 4 * block);
  const float product = map * absmax2;
  return {product + offset, 0};
}

/// scale = float(super) * sub-scale, offset = float(super_offset) * sub-offset, in float32.
ScaleOffset super_scale(const PackedSpec& spec, const PackedLayout& layout,
                        const std::uint8_t* stats, std::int64_t slot) {
  const bool packed = spec.scale == ScaleSource::kSuperU4;
  const bool offsets = spec.offset != Offset::kNone;
  const std::int64_t sub_arrays = offsets && !packed ? 2 : 1;
  const std::uint8_t* supers =
      stats + sub_arrays * layout.slots + slot / spec.nested_group_size * 2;
  const std::uint8_t byte = stats[slot];
  const int sub = packed                                ? byte & 15
                  : spec.scale == ScaleSource::kSuperI8 ? static_cast<std::int8_t>(byte)
                                                        : byte;
  const float scale = read_f16(supers) * static_cast<float>(sub);
  if (!offsets) return {scale, 0};
  const int sub_offset = packed ? byte >> 4 : stats[layout.slots + slot];
  return {scale, read_f16(supers + layout.nested_slots * 2) * static_cast<float>(sub_offset)};
}

ScaleOffset statistics_at(const PackedView& w, const PackedLayout& layout, std::int64_t row,
                          std::int64_t col) {
  const PackedSpec& spec = w.spec;
  const bool offsets = stores_offsets(spec.offset);
  const std::int64_t bytes = spec.scale == ScaleSource::kF32 ? 4
                             : spec.scale == ScaleSource::kF16 || spec.scale == ScaleSource::kBF16
                                 ? 2
                                 : 1;
  if (spec.group_map != GroupMap::kRowRuns) {
    const std::int64_t statistic = spec.group_map == GroupMap::kColumnRuns
                                       ? (row * spec.cols + col) % layout.stat_rows
                                       : row / spec.group_size * spec.cols + col;
    const std::uint8_t* stats = w.stats.data() + statistic * layout.stat_bytes;
    return {read_plain(spec, stats), offsets ? read_plain(spec, stats + bytes) : 0.0F};
  }
  const std::uint8_t* stats = w.stats.data() + row * layout.stat_bytes;
  std::int64_t phase = 0;
  std::int64_t nested_phase = 0;
  if (layout.has_header) {
    phase = stats[0] | (stats[1] << 8) | (stats[2] << 16);
    nested_phase = stats[3];
    stats += 4;
  }
  const std::int64_t slot = (phase + col) / spec.group_size;
  switch (spec.scale) {
    case ScaleSource::kNestedU8:
      return nested_scale(w, layout, stats, slot, nested_phase);
    case ScaleSource::kSuperU8:
    case ScaleSource::kSuperI8:
    case ScaleSource::kSuperU4:
      return super_scale(spec, layout, stats, slot);
    default:
      return {read_plain(spec, stats + slot * bytes),
              offsets ? read_plain(spec, stats + (layout.slots + slot) * bytes) : 0.0F};
  }
}

}  // namespace

float value(const PackedView& w, std::int64_t row, std::int64_t col) {
  const PackedLayout layout = layout_of(w.spec);
  const float c = mapped(w, code_at(w, layout, row, col));
  const auto [s, o] = statistics_at(w, layout, row, col);
  const DType dtype = w.spec.value_dtype;
  switch (w.spec.offset) {
    case Offset::kNone:
      return round_to(dtype, c * s);
    case Offset::kBias:
      return round_to(dtype, round_to(dtype, c * s) + o);
    case Offset::kShift:
      return round_to(dtype, round_to(dtype, s * c) - o);
    case Offset::kZeroPoint:
      return round_to(dtype, round_to(dtype, c - o) * s);
    case Offset::kOver127:
      return round_to(dtype, round_to(dtype, c * s) * kInverse127);
  }
  return 0;
}

Parts parts(const PackedView& w, std::int64_t row, std::int64_t col) {
  const PackedLayout layout = layout_of(w.spec);
  const auto [s, o] = statistics_at(w, layout, row, col);
  Parts out{mapped(w, code_at(w, layout, row, col)), s, 0.0};
  switch (w.spec.offset) {
    case Offset::kNone:
      break;
    case Offset::kBias:
      out.offset = o;
      break;
    case Offset::kShift:
      out.offset = -o;
      break;
    case Offset::kZeroPoint:
      out.offset = -static_cast<double>(o) * s;
      break;
    case Offset::kOver127:
      out.scale = static_cast<double>(s) * kInverse127;
      break;
  }
  return out;
}

void dequantize(const PackedView& w, const Panel& panel, DType out_dtype, void* out,
                std::int64_t ld) {
  for (std::int64_t r = panel.row_begin; r < panel.row_end; ++r) {
    for (std::int64_t c = panel.col_begin; c < panel.col_end; ++c) {
      const std::int64_t i = (r - panel.row_begin) * ld + (c - panel.col_begin);
      const float v = value(w, r, c);
      if (out_dtype == DType::kF32) static_cast<float*>(out)[i] = v;
      if (out_dtype == DType::kF16) static_cast<std::uint16_t*>(out)[i] = f32_to_f16(v);
      if (out_dtype == DType::kBF16) static_cast<std::uint16_t*>(out)[i] = f32_to_bf16(v);
    }
  }
}

}  // namespace quantal::ref

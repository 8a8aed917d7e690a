#include <cstring>

#include "core/half.h"
#include "kernels/ref/ref.h"

namespace quantal::ref {
namespace {

float round_to(DType dtype, float v) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(v));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(v));
  return v;
}

float read_float(ScaleSource source, const std::uint8_t* p) {
  if (source == ScaleSource::kF32) {
    float v = 0;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  std::uint16_t h = 0;
  std::memcpy(&h, p, sizeof(h));
  return source == ScaleSource::kF16 ? f16_to_f32(h) : bf16_to_f32(h);
}

unsigned code_at(const PackedView& w, const PackedLayout& layout, std::int64_t row,
                 std::int64_t col) {
  const std::uint8_t* codes = w.codes.data() + row * layout.code_bytes;
  if (w.spec.bits == 8) return codes[col];
  const std::int64_t strip = col / 32;
  const std::int64_t in_strip = col % 32;  // = 16 field + byte
  const unsigned byte = codes[strip * 16 + in_strip % 16];
  return in_strip < 16 ? byte & 15U : byte >> 4;
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
      return read_float(ScaleSource::kF32, w.shared.data() + 4 * code);
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
  const float offset = read_float(ScaleSource::kF32, shared);
  const float map = read_float(ScaleSource::kF32, shared + 4 + 4 * stats[slot]);
  const float absmax2 = read_float(ScaleSource::kF32, stats + layout.slots + 4 * block);
  const float product = map * absmax2;
  return {product + offset, 0};
}

ScaleOffset statistics_at(const PackedView& w, const PackedLayout& layout, std::int64_t row,
                          std::int64_t col) {
  const PackedSpec& spec = w.spec;
  const std::int64_t bytes = spec.scale == ScaleSource::kF32 ? 4 : 2;
  if (spec.group_map == GroupMap::kColumnRuns) {
    const std::uint8_t* stats =
        w.stats.data() + (row * spec.cols + col) % layout.stat_rows * layout.stat_bytes;
    if (spec.offset == Offset::kNone) return {read_float(spec.scale, stats), 0};
    return {read_float(spec.scale, stats), read_float(spec.scale, stats + bytes)};
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
  if (spec.scale == ScaleSource::kNestedU8) {
    return nested_scale(w, layout, stats, slot, nested_phase);
  }
  if (spec.offset == Offset::kNone) return {read_float(spec.scale, stats + slot * bytes), 0};
  return {read_float(spec.scale, stats + slot * bytes),
          read_float(spec.scale, stats + (layout.slots + slot) * bytes)};
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

#include "torch/aten_stats.h"

#include <algorithm>

#include "kernels/layout.h"

namespace quantal::stable_ops {
namespace {

constexpr std::int64_t kHeaderBytes = 4;
constexpr std::int64_t kPhaseMask = (1 << 24) - 1, kNestedMask = 255;

std::int64_t rows_of(const Panel& b) { return b.row_end - b.row_begin; }
std::int64_t cols_of(const Panel& b) { return b.col_end - b.col_begin; }

/// 0 `size` times, then 1 `size` times, .. count - 1: int64.
Tensor numbers_of_groups(const Tensor& like, std::int64_t count, std::int64_t size,
                         std::int64_t first = 0) {
  const Tensor numbers = aten::reshape(aten::counting(like, count, first), {count, 1});
  return aten::reshape(aten::expand(numbers, {count, size}), {count * size});
}

/// Rows [start, start + count) of a matrix that repeats itself downwards; start lies in it.
Tensor cyclic(const Tensor& t, std::int64_t start, std::int64_t count) {
  const std::int64_t period = t.size(0);
  if (start + count <= period) return aten::narrow(t, 0, start, count);
  Ints sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = count;
  const Tensor out = empty_like_of(t, sizes, t.scalar_type());
  const auto copy = [&](std::int64_t at, std::int64_t from, std::int64_t rows) {
    Tensor target = aten::narrow(out, 0, at, rows);
    stable::copy_(target, aten::narrow(t, 0, from, rows));
  };
  const std::int64_t head = period - start, whole = (count - head) / period;
  copy(0, start, head);
  if (whole > 0) {
    sizes[0] = period;
    sizes.insert(sizes.begin(), whole);
    Tensor target = aten::reshape(aten::narrow(out, 0, head, whole * period), sizes);
    stable::copy_(target, t);
  }
  const std::int64_t at = head + whole * period;
  if (at < count) copy(at, 0, count - at);
  return out;
}

ScalarType type_of(ScaleSource source) {
  return source == ScaleSource::kF32   ? ScalarType::Float
         : source == ScaleSource::kF16 ? ScalarType::Half
                                       : ScalarType::BFloat16;
}

/// 2^(code - 127): the exponent of a float32, below its smallest normal one a subnormal.
Tensor powers_of_two(const Tensor& codes) {
  constexpr double kSmallest = 1 << 22;  // bits of 2^-127
  const Tensor shift = aten::scalar(codes, 23, ScalarType::Int);
  const Tensor bits = aten::shift_left(aten::cast(codes, ScalarType::Int), shift);
  const Tensor smallest = aten::scalar(codes, kSmallest, ScalarType::Int);
  return aten::seen_as(aten::maximum(bits, smallest), ScalarType::Float);
}

}  // namespace

Tensor elements_at(const Tensor& bytes, std::int64_t begin, std::int64_t count, ScalarType type) {
  const std::int64_t size = type == ScalarType::Float ? 4 : type == ScalarType::Byte ? 1 : 2;
  const Tensor part = aten::narrow(bytes, bytes.dim() - 1, begin, count * size);
  return type == ScalarType::Byte ? part : aten::seen_as(aten::compact(part), type);
}

/// Sign apart, the bits are those of a float16 with the exponent bits of E5M2; E4M3 has one less,
/// with a bias that is 8 smaller.
Tensor small_floats(const Tensor& codes, CodeMap map) {
  const bool e4m3 = map == CodeMap::kE4M3;
  const double unit = e4m3 ? 256.0 : 1.0;
  const auto byte = [&](double v) { return aten::scalar(codes, v, ScalarType::Byte); };
  const auto number = [&](double v) { return aten::scalar(codes, v, ScalarType::Float); };
  const Tensor size = aten::bit_and(codes, byte(127));
  const Tensor bits = aten::shift_left(aten::cast(size, ScalarType::Short),
                                       aten::scalar(codes, e4m3 ? 7 : 8, ScalarType::Short));
  const Tensor sign = aten::cast(aten::shift_right(codes, byte(7)), ScalarType::Float);
  const Tensor factor = aten::subtract(number(unit), aten::multiply(sign, number(2 * unit)));
  const Tensor v =
      aten::multiply(aten::cast(aten::seen_as(bits, ScalarType::Half), ScalarType::Float), factor);
  if (!e4m3) return v;
  return aten::choose(aten::equal(size, byte(127)),
                      number(std::numeric_limits<double>::quiet_NaN()), v);
}

AtenStats::AtenStats(const PackedSpec& spec, const Tensor& stats, const Tensor& shared)
    : spec_(spec),
      layout_(layout_of(spec)),
      stats_(aten::reshape(stats, {layout_.stat_rows, layout_.stat_bytes})),
      shared_(shared),
      crosses_(spec.group_map == GroupMap::kRowRuns && spec.cols % spec.group_size != 0) {}

bool AtenStats::whole_rows() const {
  return spec_.group_map == GroupMap::kColumnRuns && layout_.stat_rows % spec_.cols != 0;
}

Tensor AtenStats::rounded(Tensor v) const {
  if (spec_.value_dtype == DType::kF32) return v;
  v = aten::cast(v, spec_.value_dtype == DType::kF16 ? ScalarType::Half : ScalarType::BFloat16);
  return aten::cast(v, ScalarType::Float);
}

std::int64_t AtenStats::block_rows(const Panel& panel, std::int64_t row,
                                   std::int64_t weights) const {
  const std::int64_t width = whole_rows() ? spec_.cols : cols_of(panel);
  const std::int64_t rows =
      std::min(panel.row_end - row, std::max<std::int64_t>(weights / width, 1));
  if (spec_.group_map != GroupMap::kColumnBlocks) return rows;
  const std::int64_t inside = row % spec_.group_size;
  if (inside != 0 || rows < spec_.group_size) return std::min(rows, spec_.group_size - inside);
  return rows / spec_.group_size * spec_.group_size;
}

BlockStats AtenStats::of(const Panel& block) const {
  switch (spec_.group_map) {
    case GroupMap::kColumnRuns:
      return of_column_runs(block);
    case GroupMap::kColumnBlocks:
      return of_column_blocks(block);
    case GroupMap::kRowRuns:
      break;
  }
  return of_row_runs(block);
}

// ------------------------------------------------------------------ which weights share a scale

BlockStats AtenStats::of_row_runs(const Panel& b) const {
  const std::int64_t rows = rows_of(b), cols = cols_of(b), size = spec_.group_size;
  const Tensor bytes = aten::narrow(stats_, 0, b.row_begin, rows);
  const Group all = slots(bytes);
  const auto each = [&](const Ints& shape, auto spread) {
    BlockStats out{spread(all.scale), std::nullopt, shape};
    if (all.offset) out.offset = spread(*all.offset);
    return out;
  };
  if (crosses_) {
    const std::int64_t last = std::min(layout_.slots * size - spec_.cols, size - 1);
    const Tensor slot = crossed(phases(bytes, 0, kPhaseMask, last), b.col_begin, b.col_end, size);
    return each({rows, cols}, [&](const Tensor& t) { return aten::pick_in_rows(t, slot); });
  }
  const std::int64_t first = b.col_begin / size, count = (b.col_end - 1) / size - first + 1;
  const auto touched = [&](const Tensor& t) { return aten::narrow(t, 1, first, count); };
  if (count == 1) return each({rows, cols}, touched);
  if (b.col_begin % size == 0 && b.col_end % size == 0) {
    return each({rows, count, size}, [&](const Tensor& t) {
      return aten::reshape(touched(t), {rows, count, 1});
    });
  }
  const Tensor group =
      aten::narrow(numbers_of_groups(stats_, count, size), 0, b.col_begin - first * size, cols);
  return each({rows, cols}, [&](const Tensor& t) { return aten::pick(touched(t), 1, group); });
}

BlockStats AtenStats::of_column_runs(const Panel& b) const {
  const std::int64_t rows = rows_of(b), cols = cols_of(b), bytes = layout_.stat_bytes;
  Tensor found = stats_;
  if (whole_rows()) {
    found = cyclic(stats_, b.row_begin * spec_.cols % layout_.stat_rows, rows * spec_.cols);
    found = aten::narrow(aten::reshape(found, {rows, spec_.cols, bytes}), 1, b.col_begin, cols);
  } else {
    const std::int64_t period = layout_.stat_rows / spec_.cols;
    found = aten::reshape(stats_, {period, spec_.cols, bytes});
    found = cyclic(aten::narrow(found, 1, b.col_begin, cols), b.row_begin % period, rows);
  }
  const Group all = plain(found, 0, scale_bytes(spec_.scale), 1);
  BlockStats out{aten::reshape(all.scale, {rows, cols}), std::nullopt, {rows, cols}};
  if (all.offset) out.offset = aten::reshape(*all.offset, {rows, cols});
  return out;
}

BlockStats AtenStats::of_column_blocks(const Panel& b) const {
  const std::int64_t rows = rows_of(b), cols = cols_of(b), size = spec_.group_size;
  const std::int64_t first = b.row_begin / size, count = (b.row_end - 1) / size - first + 1;
  const Tensor all = aten::reshape(stats_, {spec_.rows / size, spec_.cols, layout_.stat_bytes});
  const Tensor found = aten::narrow(aten::narrow(all, 0, first, count), 1, b.col_begin, cols);
  const Group group = plain(found, 0, scale_bytes(spec_.scale), 1);
  const Ints place{count, 1, cols};
  BlockStats out{aten::reshape(group.scale, place), std::nullopt, {count, rows / count, cols}};
  if (group.offset) out.offset = aten::reshape(*group.offset, place);
  return out;
}

// ------------------------------------------------------------------ where scales come from

/// Statistics of all slots of some rows: [rows, slots].
AtenStats::Group AtenStats::slots(const Tensor& rows) const {
  if (spec_.scale == ScaleSource::kNestedU8) return {nested(rows), std::nullopt};
  if (is_super(spec_.scale)) return supers(rows);
  const std::int64_t begin = layout_.has_header ? kHeaderBytes : 0;
  return plain(rows, begin, begin + layout_.slots * scale_bytes(spec_.scale), layout_.slots);
}

AtenStats::Group AtenStats::plain(const Tensor& bytes, std::int64_t scales, std::int64_t offsets,
                                  std::int64_t count) const {
  Group out{elements(bytes, scales, count), std::nullopt};
  if (stores_offsets(spec_.offset)) out.offset = elements(bytes, offsets, count);
  return out;
}

/// Plain scales or offsets; one-byte floats are rounded to the value type.
Tensor AtenStats::elements(const Tensor& bytes, std::int64_t begin, std::int64_t count) const {
  if (scale_bytes(spec_.scale) != 1) {
    return aten::cast(elements_at(bytes, begin, count, type_of(spec_.scale)), ScalarType::Float);
  }
  const Tensor codes = elements_at(bytes, begin, count, ScalarType::Byte);
  return rounded(spec_.scale == ScaleSource::kE8M0 ? powers_of_two(codes)
                                                   : small_floats(codes, CodeMap::kE4M3));
}

/// scale = map[code] * absmax2 + nested_offset.
Tensor AtenStats::nested(const Tensor& rows) const {
  const std::int64_t count = rows.size(0), slots = layout_.slots, size = spec_.nested_group_size;
  const std::int64_t own = spec_.code_map == CodeMap::kTable ? 16 : 0;  // floats before it
  const Tensor offset = elements_at(shared_, 4 * own, 1, ScalarType::Float);
  const Tensor map = elements_at(shared_, 4 * (own + 1), 256, ScalarType::Float);
  const Tensor codes = elements_at(rows, kHeaderBytes, slots, ScalarType::Byte);
  const Tensor index = aten::reshape(aten::cast(codes, ScalarType::Int), {count * slots});
  const Tensor inner = aten::reshape(aten::pick(map, 0, index), {count, slots});
  Tensor outer = elements_at(rows, kHeaderBytes + slots, layout_.nested_slots, ScalarType::Float);
  if (layout_.nested_slots > 1) {
    const std::int64_t last = std::min(layout_.nested_slots * size - slots, size - 1);
    outer = aten::pick_in_rows(outer, crossed(phases(rows, 24, kNestedMask, last), 0, slots, size));
  }
  return aten::add(aten::multiply(inner, outer), offset);
}

/// scale = float(super) * sub-scale, offset = float(super_offset) * sub-offset.
AtenStats::Group AtenStats::supers(const Tensor& rows) const {
  const std::int64_t count = rows.size(0), slots = layout_.slots, blocks = layout_.nested_slots;
  const bool offsets = stores_offsets(spec_.offset), nibbles = spec_.scale == ScaleSource::kSuperU4;
  const auto product = [&](std::int64_t at, const Tensor& sub) {
    const Tensor super = elements_at(rows, at, blocks, ScalarType::Half);
    const Tensor wide = aten::reshape(aten::cast(super, ScalarType::Float), {count, blocks, 1});
    const Tensor number =
        aten::reshape(aten::cast(sub, ScalarType::Float), {count, blocks, spec_.nested_group_size});
    return aten::reshape(aten::multiply(wide, number), {count, slots});
  };
  const auto byte = [&](double v) { return aten::scalar(rows, v, ScalarType::Byte); };
  const std::int64_t at = (offsets && !nibbles ? 2 : 1) * slots;
  Tensor sub = elements_at(rows, 0, slots, ScalarType::Byte);
  Tensor sub_offset = sub;
  if (nibbles) {
    sub_offset = aten::shift_right(sub, byte(4));
    sub = aten::bit_and(sub, byte(15));
  } else if (offsets) {
    sub_offset = elements_at(rows, slots, slots, ScalarType::Byte);
  }
  if (spec_.scale == ScaleSource::kSuperI8) sub = aten::seen_as(sub, ScalarType::Char);
  Group out{product(at, sub), std::nullopt};
  if (offsets) out.offset = product(at + 2 * blocks, sub_offset);
  return out;
}

// ------------------------------------------------------------------ groups that cross borders

/// A part of the headers, [rows, 1] int32; they come from outside, and `last` keeps what they point
/// at inside a row.
Tensor AtenStats::phases(const Tensor& rows, int shift, std::int64_t mask,
                         std::int64_t last) const {
  const auto number = [&](std::int64_t v) {
    return aten::scalar(rows, static_cast<double>(v), ScalarType::Int);
  };
  Tensor header =
      aten::seen_as(aten::compact(aten::narrow(rows, 1, 0, kHeaderBytes)), ScalarType::Int);
  if (shift != 0) header = aten::shift_right(header, number(shift));
  return aten::minimum(aten::bit_and(header, number(mask)), number(last));
}

/// (phase + i) / size for i in [begin, end): [rows, end - begin] int64; phase < size. It is i /
/// size, and one more where the phase reaches the rest of the group.
Tensor AtenStats::crossed(const Tensor& phase, std::int64_t begin, std::int64_t end,
                          std::int64_t size) const {
  const std::int64_t length = std::min(size, end), count = ceil_div(end, length);
  const auto part = [&](const Tensor& t) { return aten::narrow(t, 0, begin, end - begin); };
  const Tensor rest = aten::cast(aten::counting(phase, length, size, -1), ScalarType::Int);
  const Tensor rests = aten::reshape(
      aten::expand(aten::reshape(rest, {1, length}), {count, length}), {count * length});
  return aten::choose(aten::at_least(phase, part(rests)),
                      part(numbers_of_groups(phase, count, length, 1)),
                      part(numbers_of_groups(phase, count, length)));
}

}  // namespace quantal::stable_ops

#include "formats/quanto/quanto_pack.h"

#include <algorithm>
#include <cstring>

#include "formats/tensors.h"

namespace quantal::quanto {
namespace {

/// Stretch of a row of codes that lies `stride` bytes apart in one field of the packed bytes.
struct Stretch {
  std::int64_t col = 0, count = 0;
  std::int64_t offset = 0, stride = 1;
  int shift = 0;
};

/// Calls body(Stretch) for all codes of row `r` of the weight.
template <class Body>
void for_each_stretch(const PackedSpec& spec, const Grouped& g, std::int64_t r, Body body) {
  const auto field = [&](std::int64_t row) {
    return static_cast<int>(row / g.packed_rows) * spec.bits;
  };
  if (g.columns) {
    const std::int64_t row = r % g.rows, block = r / g.rows;
    body(Stretch{0, spec.cols, row % g.packed_rows * g.cols + block, g.blocks, field(row)});
    return;
  }
  for (std::int64_t col = 0; col < spec.cols; col += g.cols) {
    const std::int64_t row = (r * spec.cols + col) / g.cols;
    body(Stretch{col, g.cols, row % g.packed_rows * g.cols, 1, field(row)});
  }
}

/// Rows of codes beyond the last one of the weight.
std::int64_t pad_rows(const PackedSpec& spec, const Grouped& g) {
  return g.packed_rows * (8 / spec.bits) - g.rows;
}

/// Calls body(byte index, shift, index among pad codes) for every code beyond the last row.
template <class Body>
void for_each_pad(const PackedSpec& spec, const Grouped& g, Body body) {
  const std::int64_t all_rows = g.packed_rows * (8 / spec.bits);
  for (std::int64_t row = g.rows; row < all_rows; ++row) {
    const int shift = static_cast<int>(row / g.packed_rows) * spec.bits;
    for (std::int64_t j = 0; j < g.cols; ++j) {
      body(row % g.packed_rows * g.cols + j, shift, (row - g.rows) * g.cols + j);
    }
  }
}

constexpr std::uint8_t kInput = 1, kOutput = 2, kPad = 3, kZeroScale = 4;
constexpr std::size_t kRecordHead = 16;

/// Head: tag, dtype, dimensions (0 or 1), five zeros, then the bytes that follow as i64.
void append(std::vector<std::uint8_t>& out, std::uint8_t tag, DType dtype, std::size_t dimensions,
            std::span<const std::uint8_t> bytes) {
  std::array<std::uint8_t, kRecordHead> head{};
  head[0] = tag;
  head[1] = static_cast<std::uint8_t>(dtype);
  head[2] = static_cast<std::uint8_t>(dimensions);
  const auto size = static_cast<std::int64_t>(bytes.size());
  std::memcpy(head.data() + 8, &size, sizeof(size));
  out.insert(out.end(), head.begin(), head.end());
  out.insert(out.end(), bytes.begin(), bytes.end());
}

[[noreturn]] void refuse_residue(const std::string& text) {
  fail(Errc::kCorrupt, "quanto: kept bytes of a layer: " + text);
}

}  // namespace

std::vector<std::uint8_t> pack_codes(const PackedView& w, std::span<const std::uint8_t> pad) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const Grouped g = grouped_of(spec);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(g.packed_rows * g.cols));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * layout.code_bytes, spec.cols, row.data());
    for_each_stretch(spec, g, r, [&](const Stretch& s) {
      std::uint8_t* to = out.data() + s.offset;
      const std::uint8_t* from = row.data() + s.col;
      for (std::int64_t j = 0; j < s.count; ++j) {
        to[j * s.stride] = static_cast<std::uint8_t>(to[j * s.stride] | (from[j] << s.shift));
      }
    });
  }
  if (pad.empty()) return out;
  for_each_pad(spec, g, [&](std::int64_t byte, int shift, std::int64_t i) {
    if (static_cast<std::size_t>(i) >= pad.size()) refuse_residue("pad codes are too few");
    std::uint8_t& to = out[static_cast<std::size_t>(byte)];
    to = static_cast<std::uint8_t>(to | (pad[static_cast<std::size_t>(i)] << shift));
  });
  return out;
}

void unpack_codes(std::span<const std::uint8_t> packed, const PackedSpec& spec, RowRange rows,
                  std::uint8_t* out) {
  const Grouped g = grouped_of(spec);
  const auto mask = static_cast<std::uint8_t>((1 << spec.bits) - 1);
  pack_rows(spec, rows, out, [&](std::int64_t r, std::uint8_t* row) {
    for_each_stretch(spec, g, r, [&](const Stretch& s) {
      const std::uint8_t* from = packed.data() + s.offset;
      std::uint8_t* to = row + s.col;
      for (std::int64_t j = 0; j < s.count; ++j) {
        to[j] = static_cast<std::uint8_t>(from[j * s.stride] >> s.shift) & mask;
      }
    });
  });
}

bool has_pad(const PackedSpec& spec) { return pad_rows(spec, grouped_of(spec)) != 0; }

std::vector<std::uint8_t> pad_codes(std::span<const std::uint8_t> packed, const PackedSpec& spec) {
  const Grouped g = grouped_of(spec);
  const auto mask = static_cast<std::uint8_t>((1 << spec.bits) - 1);
  std::vector<std::uint8_t> pad(static_cast<std::size_t>(pad_rows(spec, g) * g.cols));
  for_each_pad(spec, g, [&](std::int64_t byte, int shift, std::int64_t i) {
    pad[static_cast<std::size_t>(i)] =
        static_cast<std::uint8_t>(packed[static_cast<std::size_t>(byte)] >> shift) & mask;
  });
  const bool empty = std::all_of(pad.begin(), pad.end(), [](std::uint8_t c) { return c == 0; });
  return empty ? std::vector<std::uint8_t>{} : pad;
}

GroupNumbers read_numbers(const PackedView& w) {
  if (w.spec.group_map == GroupMap::kRowRuns) {
    GatheredStats stats = gather_stats(w);
    return {std::move(stats.scales), std::move(stats.offsets)};
  }
  const std::size_t item = dtype_size(w.spec.value_dtype);
  const bool offsets = stores_offsets(w.spec.offset);
  const std::size_t step = offsets ? 2 * item : item, groups = w.stats.size() / step;
  const auto cols = static_cast<std::size_t>(w.spec.cols), blocks = groups / cols;
  GroupNumbers out;
  out.scales.resize(groups * item);
  if (offsets) out.offsets.resize(groups * item);
  for (std::size_t i = 0; i < groups; ++i) {
    const std::size_t to = (i % cols * blocks + i / cols) * item;
    std::memcpy(out.scales.data() + to, w.stats.data() + i * step, item);
    if (offsets) std::memcpy(out.offsets.data() + to, w.stats.data() + i * step + item, item);
  }
  return out;
}

void write_numbers(const StoredNumbers& numbers, const PackedSpec& spec, RowRange rows,
                   std::uint8_t* out) {
  const PackedLayout layout = layout_of(spec);
  const bool runs = spec.group_map == GroupMap::kRowRuns;
  const auto item = static_cast<std::int64_t>(dtype_size(spec.value_dtype));
  const std::int64_t blocks = layout.stat_rows / std::max<std::int64_t>(spec.cols, 1);
  const std::int64_t each = runs ? layout.slots : 1;  // groups of a row of statistics
  for (std::int64_t i = rows.begin; i < rows.end; ++i, out += layout.stat_bytes) {
    for (std::int64_t k = 0; k < each; ++k) {
      const std::int64_t from = numbers.one ? 0
                                : runs      ? i * each + k
                                            : i % spec.cols * blocks + i / spec.cols;
      std::memcpy(out + k * item, numbers.scales.data() + from * item,
                  static_cast<std::size_t>(item));
      if (numbers.offsets.empty()) continue;
      std::uint8_t* offset = out + (each + k) * item;
      if (numbers.codes) {
        const float zero = numbers.offsets[static_cast<std::size_t>(from)];
        narrow_from_f32(spec.value_dtype, &zero, 1, offset);
      } else {
        std::memcpy(offset, numbers.offsets.data() + from * item, static_cast<std::size_t>(item));
      }
    }
  }
}

std::vector<std::uint8_t> Residue::encode() const {
  std::vector<std::uint8_t> out;
  if (input_scale) {
    append(out, kInput, input_scale->dtype, input_scale->shape.size(), input_scale->bytes);
  }
  if (output_scale) {
    append(out, kOutput, output_scale->dtype, output_scale->shape.size(), output_scale->bytes);
  }
  if (!pad.empty()) append(out, kPad, DType::kU8, 1, pad);
  if (!zero_scale_codes.empty()) append(out, kZeroScale, DType::kU8, 1, zero_scale_codes);
  return out;
}

Residue Residue::decode(std::span<const std::uint8_t> bytes) {
  Residue out;
  while (!bytes.empty()) {
    if (bytes.size() < kRecordHead) refuse_residue("a record is cut off");
    std::int64_t size = 0;
    std::memcpy(&size, bytes.data() + 8, sizeof(size));
    const std::uint8_t tag = bytes[0], dimensions = bytes[2];
    const auto dtype = static_cast<DType>(bytes[1]);
    bytes = bytes.subspan(kRecordHead);
    if (size < 0 || static_cast<std::uint64_t>(size) > bytes.size()) {
      refuse_residue("a record has " + std::to_string(size) + " bytes, expected at most " +
                     std::to_string(bytes.size()));
    }
    const auto content = bytes.first(static_cast<std::size_t>(size));
    bytes = bytes.subspan(content.size());
    if (tag == kPad || tag == kZeroScale) {
      (tag == kPad ? out.pad : out.zero_scale_codes).assign(content.begin(), content.end());
      continue;
    }
    const bool scale = (tag == kInput || tag == kOutput) && is_weight_dtype(dtype) &&
                       dimensions <= 1 && content.size() == dtype_size(dtype);
    if (!scale) refuse_residue("tag " + std::to_string(tag) + " is none of 1 to 4");
    (tag == kInput ? out.input_scale : out.output_scale) =
        tensor_of(dtype, std::vector<std::int64_t>(dimensions, 1), content);
  }
  return out;
}

std::span<const std::uint8_t> residue_of(const PackedView& w) {
  return w.shared.last(static_cast<std::size_t>(w.spec.residue_bytes));
}

Tensor unit_scale(DType dtype) {
  Tensor out = make_tensor(dtype, {});
  const float one = 1.0F;
  narrow_from_f32(dtype, &one, 1, out.bytes.data());
  return out;
}

}  // namespace quantal::quanto

// Blocks to packed rows and back. A row's blocks and its statistics are whole, so each row is
// independent: no statistic crosses rows.
#include <array>
#include <cstring>
#include <string>

#include "formats/gguf/blocks.h"
#include "formats/gguf/gguf_params.h"
#include "formats/tensors.h"
#include "quantal/ggml.h"

namespace quantal {
namespace {

using formats::gguf::Parts;
using gguf::BlockForm;

const BlockForm& form_of(GgmlType type, const char* where) {
  if (const BlockForm* form = gguf::find_form(type)) return *form;
  const GgmlBlock* block = find_ggml_block(static_cast<std::uint32_t>(type));
  fail(Errc::kUnsupported,
       std::string(where) + ": tensor type is " +
           (block == nullptr ? std::to_string(static_cast<std::uint32_t>(type))
                             : std::string(block->name)) +
           ", which has no packed form, expected Q4_0 to Q8_0, Q2_K to Q6_K or IQ4_NL");
}

/// Where the statistics of a row stand; see PackedLayout.
struct StatRow {
  std::uint8_t* scales;         // slots f16, or slots bytes of super-blocks
  std::uint8_t* offsets;        // the same; null where none are stored beside the scales
  std::uint8_t* supers;         // blocks f16; null without super-blocks
  std::uint8_t* super_offsets;  // blocks f16; null without offsets

  StatRow(const BlockForm& form, std::int64_t blocks, std::uint8_t* row)
      : scales(row), offsets(nullptr), supers(nullptr), super_offsets(nullptr) {
    const bool super = form.sub_blocks > 1;
    const std::int64_t bytes = blocks * (super ? form.sub_blocks : 2);
    const bool has_offset = form.offset != Offset::kNone;
    row += bytes;
    if (has_offset && form.scale != ScaleSource::kSuperU4) {
      offsets = row;
      row += bytes;
    }
    if (!super) return;
    supers = row;
    if (has_offset) super_offsets = row + 2 * blocks;
  }
};

/// Moves the statistics of block `b` between a row and parts; `kStore` writes the row.
template <bool kStore>
void move_stats(const BlockForm& form, const StatRow& row, std::int64_t b, Parts& parts) {
  const auto move = [](std::uint8_t* stored, void* part, std::size_t bytes) {
    if (stored == nullptr) return;
    if constexpr (kStore) {
      std::memcpy(stored, part, bytes);
    } else {
      std::memcpy(part, stored, bytes);
    }
  };
  const auto at = [b](std::uint8_t* base, std::int64_t step) {
    return base == nullptr ? nullptr : base + b * step;
  };
  if (form.sub_blocks == 1) {
    move(at(row.scales, 2), &parts.scale, 2);
    move(at(row.offsets, 2), &parts.offset, 2);
    return;
  }
  move(at(row.scales, form.sub_blocks), parts.scales, static_cast<std::size_t>(form.sub_blocks));
  move(at(row.offsets, form.sub_blocks), parts.offsets, static_cast<std::size_t>(form.sub_blocks));
  move(at(row.supers, 2), &parts.scale, 2);
  move(at(row.super_offsets, 2), &parts.offset, 2);
}

/// The 16 bytes of codes of a 4-bit block of 32 are a strip of the packed form, as they are.
template <class Block>
constexpr bool kIsStrip =
    std::is_same_v<Block, formats::gguf::Q4_0> || std::is_same_v<Block, formats::gguf::Q4_1> ||
    std::is_same_v<Block, formats::gguf::IQ4_NL>;

/// What a row's conversion needs to know.
struct RowJob {
  const BlockForm& form;
  PackedLayout layout;
  std::int64_t cols, blocks, row_bytes;
};

template <class Block>
void pack_one_row(const RowJob& job, const std::uint8_t* from, std::uint8_t* codes,
                  std::uint8_t* stats, std::uint8_t* scratch) {
  const StatRow row(job.form, job.blocks, stats);
  const std::int64_t elements = job.form.group_size * job.form.sub_blocks;
  Parts parts{};
  for (std::int64_t b = 0; b < job.blocks; ++b) {
    Block block;
    std::memcpy(&block, from + b * static_cast<std::int64_t>(sizeof(Block)), sizeof(Block));
    if constexpr (kIsStrip<Block>) {
      parts.scale = static_cast<std::uint16_t>(block.d[0] | block.d[1] << 8);
      if constexpr (std::is_same_v<Block, formats::gguf::Q4_1>) {
        parts.offset = static_cast<std::uint16_t>(block.m[0] | block.m[1] << 8);
      }
      std::memcpy(codes + b * 16, block.qs, 16);
    } else {
      formats::gguf::take_apart(block, parts);
      std::memcpy(scratch + b * elements, parts.codes, static_cast<std::size_t>(elements));
    }
    move_stats<true>(job.form, row, b, parts);
  }
  if constexpr (!kIsStrip<Block>) pack_row(job.form.bits, scratch, job.cols, codes);
}

/// Returns false if a sub-scale has no place in its block.
template <class Block>
bool unpack_one_row(const RowJob& job, const std::uint8_t* codes, const std::uint8_t* stats,
                    std::uint8_t* to, std::uint8_t* scratch) {
  const StatRow row(job.form, job.blocks, const_cast<std::uint8_t*>(stats));  // only read
  const std::int64_t elements = job.form.group_size * job.form.sub_blocks;
  unpack_row(job.form.bits, codes, job.cols, scratch);
  Parts parts{};
  for (std::int64_t b = 0; b < job.blocks; ++b) {
    std::memcpy(parts.codes, scratch + b * elements, static_cast<std::size_t>(elements));
    move_stats<false>(job.form, row, b, parts);
    Block block;
    if (!formats::gguf::put_together(parts, block)) return false;
    std::memcpy(to + b * static_cast<std::int64_t>(sizeof(Block)), &block, sizeof(Block));
  }
  return true;
}

/// Calls body.template operator()<Block>() with the structure of the type.
template <class Body>
auto with_block(GgmlType type, Body body) {
  using namespace formats::gguf;
  switch (type) {
    case GgmlType::kQ4_0:
      return body.template operator()<Q4_0>();
    case GgmlType::kQ4_1:
      return body.template operator()<Q4_1>();
    case GgmlType::kQ5_0:
      return body.template operator()<Q5_0>();
    case GgmlType::kQ5_1:
      return body.template operator()<Q5_1>();
    case GgmlType::kQ8_0:
      return body.template operator()<Q8_0>();
    case GgmlType::kQ2_K:
      return body.template operator()<Q2_K>();
    case GgmlType::kQ3_K:
      return body.template operator()<Q3_K>();
    case GgmlType::kQ4_K:
      return body.template operator()<Q4_K>();
    case GgmlType::kQ5_K:
      return body.template operator()<Q5_K>();
    case GgmlType::kQ6_K:
      return body.template operator()<Q6_K>();
    default:
      return body.template operator()<IQ4_NL>();
  }
}

RowJob job_of(const BlockForm& form, const PackedSpec& spec) {
  const std::int64_t elements = form.group_size * form.sub_blocks;
  return {form, layout_of(spec), spec.cols, spec.cols / elements,
          ggml_bytes(form.type, 1, spec.cols)};
}

void pack_rows_of(const RowJob& job, std::int64_t rows, const std::uint8_t* blocks,
                  std::uint8_t* codes, std::uint8_t* stats, std::uint8_t* scratch) {
  with_block(job.form.type, [&]<class Block>() {
    for (std::int64_t r = 0; r < rows; ++r) {
      pack_one_row<Block>(job, blocks + r * job.row_bytes, codes + r * job.layout.code_bytes,
                          stats + r * job.layout.stat_bytes, scratch);
    }
  });
}

}  // namespace

bool ggml_packable(GgmlType type) noexcept { return gguf::find_form(type) != nullptr; }

PackedSpec ggml_spec(GgmlType type, std::int64_t rows, std::int64_t cols) {
  const BlockForm& form = form_of(type, "ggml_spec");
  ggml_bytes(type, rows, cols);  // whole blocks, no overflow
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = form.bits;
  spec.code_map = form.code_map;
  spec.centre = form.centre;
  spec.offset = form.offset;
  spec.scale = form.scale;
  spec.group_size = form.group_size;
  if (form.sub_blocks > 1) spec.nested_group_size = form.sub_blocks;
  spec.dialect = gguf::kDialectId;
  spec.dialect_flags = static_cast<std::int64_t>(type);
  validate_spec(spec);
  return spec;
}

GgmlType ggml_type_of(const PackedSpec& spec) {
  if (spec.dialect != gguf::kDialectId) {
    fail(Errc::kUnsupported, "gguf: matrix is of dialect " + std::to_string(spec.dialect) +
                                 ", expected " + std::to_string(gguf::kDialectId) + " (gguf)");
  }
  const auto type = static_cast<GgmlType>(spec.dialect_flags);
  if (spec.dialect_flags < 0 || spec.dialect_flags > 255 || !ggml_packable(type) ||
      spec != ggml_spec(type, spec.rows, spec.cols)) {
    fail(Errc::kCorrupt, "gguf: packed spec is not that of a block type (flags " +
                             std::to_string(spec.dialect_flags) + ", bits " +
                             std::to_string(spec.bits) + ")");
  }
  return type;
}

PackedMatrix pack_ggml(GgmlType type, std::int64_t rows, std::int64_t cols,
                       std::span<const std::uint8_t> blocks, const Executor& executor) {
  PackedMatrix w = make_packed(ggml_spec(type, rows, cols));
  check_size("gguf: bytes of " + std::string(ggml_block(type).name) + " blocks", blocks.size(),
             static_cast<std::size_t>(ggml_bytes(type, rows, cols)));
  const RowJob job = job_of(form_of(type, "pack_ggml"), w.spec);
  executor.parallel_for(0, rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(cols));
    pack_rows_of(job, end - begin, blocks.data() + begin * job.row_bytes,
                 w.codes.data() + begin * job.layout.code_bytes,
                 w.stats.data() + begin * job.layout.stat_bytes, scratch.data());
  });
  return w;
}

namespace gguf {

void pack_blocks(GgmlType type, const PackedSpec& spec, const std::uint8_t* blocks,
                 std::uint8_t* codes, std::uint8_t* stats, std::uint8_t* scratch) {
  pack_rows_of(job_of(form_of(type, "pack_blocks"), spec), spec.rows, blocks, codes, stats,
               scratch);
}

}  // namespace gguf

std::vector<std::uint8_t> unpack_ggml(const PackedView& w, const Executor& executor) {
  const GgmlType type = ggml_type_of(w.spec);
  check_packed(w);
  const std::int64_t rows = w.spec.rows, cols = w.spec.cols;
  std::vector<std::uint8_t> out(static_cast<std::size_t>(ggml_bytes(type, rows, cols)));
  const RowJob job = job_of(form_of(type, "unpack_ggml"), w.spec);
  executor.parallel_for(0, rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(cols));
    with_block(type, [&]<class Block>() {
      for (std::int64_t r = begin; r < end; ++r) {
        if (unpack_one_row<Block>(job, w.codes.data() + r * job.layout.code_bytes,
                                  w.stats.data() + r * job.layout.stat_bytes,
                                  out.data() + r * job.row_bytes, scratch.data())) {
          continue;
        }
        fail(Errc::kCorrupt, "gguf: a sub-scale of row " + std::to_string(r) +
                                 " has more than 6 bits, " + std::string(ggml_block(type).name) +
                                 " has no place for it");
      }
    });
  });
  return out;
}

}  // namespace quantal

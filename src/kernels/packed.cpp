// The packed matrix: its spec, the sizes that follow from it, and the tables of its codes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "kernels/layout.h"
#include "kernels/widths.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::int64_t kMaxCols = std::int64_t{1} << 48;
constexpr std::int64_t kMaxGroupSize = (std::int64_t{1} << 24) - 1;
constexpr std::int64_t kMaxNestedGroupSize = 256;
constexpr std::int64_t kMaxResidueBytes = std::int64_t{1} << 40;

[[noreturn]] void fail_spec(Errc code, const std::string& member, std::int64_t actual,
                            const std::string& expected) {
  fail(code, "packed spec: " + member + " is " + std::to_string(actual) + ", expected " + expected);
}

void check_range(Errc code, const char* member, std::int64_t value, std::int64_t low,
                 std::int64_t high) {
  if (value >= low && value <= high) return;
  fail_spec(code, member, value, std::to_string(low) + " .. " + std::to_string(high));
}

/// Most groups of `size` elements that a run of `length` elements can touch when it starts at any
/// multiple of gcd(step, size) inside a group.
std::int64_t max_touched(std::int64_t length, std::int64_t size, std::int64_t step) {
  const std::int64_t latest_phase = size - std::gcd(step, size);
  return ceil_div(latest_phase + length, size);
}

}  // namespace

const std::array<float, 16> kNf4Codebook = {-1.0F,
                                            -0.6961928009986877F,
                                            -0.5250730514526367F,
                                            -0.39491748809814453F,
                                            -0.28444138169288635F,
                                            -0.18477343022823334F,
                                            -0.09105003625154495F,
                                            0.0F,
                                            0.07958029955625534F,
                                            0.16093020141124725F,
                                            0.24611230194568634F,
                                            0.33791524171829224F,
                                            0.44070982933044434F,
                                            0.5626170039176941F,
                                            0.7229568362236023F,
                                            1.0F};

// Magnitudes are m / 12 rounded once to float32.
const std::array<float, 16> kFp4Codebook = {
    0.0F, 0.0625F / 12.0F,  8.0F / 12.0F,  1.0F,  4.0F / 12.0F,  0.5F,  2.0F / 12.0F,  0.25F,
    0.0F, -0.0625F / 12.0F, -8.0F / 12.0F, -1.0F, -4.0F / 12.0F, -0.5F, -2.0F / 12.0F, -0.25F};

const std::array<float, 16> kE2M1Codebook = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,
                                             4.0F,  6.0F,  -0.0F, -0.5F, -1.0F, -1.5F,
                                             -2.0F, -3.0F, -4.0F, -6.0F};

const std::array<float, 16> kIq4NlCodebook = {-127.0F, -104.0F, -83.0F, -65.0F, -49.0F, -35.0F,
                                              -22.0F,  -10.0F,  1.0F,   13.0F,  25.0F,  38.0F,
                                              53.0F,   69.0F,   89.0F,  113.0F};

namespace {

/// Values of an 8-bit float of `exponent_bits`, without its special codes.
std::array<float, 256> small_floats(int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code & 127) >> mantissa_bits;
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
    const float magnitude =
        std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - mantissa_bits);
    values[static_cast<std::size_t>(code)] = code < 128 ? magnitude : -magnitude;
  }
  return values;
}

std::array<float, 256> e4m3_values() {
  std::array<float, 256> values = small_floats(4);
  values[0x7F] = values[0xFF] = std::numeric_limits<float>::quiet_NaN();
  return values;
}

std::array<float, 256> e5m2_values() {
  std::array<float, 256> values = small_floats(5);
  for (std::size_t sign : {0U, 128U}) {
    values[sign + 0x7C] = sign == 0 ? std::numeric_limits<float>::infinity()
                                    : -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0x7D; i <= 0x7F; ++i) {
      values[sign + i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return values;
}

}  // namespace

const std::array<float, 256> kE4M3Values = e4m3_values();
const std::array<float, 256> kE5M2Values = e5m2_values();

const std::array<float, 16>* fixed_table(CodeMap map) {
  switch (map) {
    case CodeMap::kNf4:
      return &kNf4Codebook;
    case CodeMap::kFp4:
      return &kFp4Codebook;
    case CodeMap::kE2M1:
      return &kE2M1Codebook;
    case CodeMap::kIq4Nl:
      return &kIq4NlCodebook;
    default:
      return nullptr;
  }
}

std::array<std::int64_t, kSpecInts> spec_to_ints(const PackedSpec& spec) {
  return {kLayoutVersion,
          spec.rows,
          spec.cols,
          spec.bits,
          static_cast<std::int64_t>(spec.code_map),
          spec.centre,
          static_cast<std::int64_t>(spec.offset),
          static_cast<std::int64_t>(spec.scale),
          static_cast<std::int64_t>(spec.value_dtype),
          static_cast<std::int64_t>(spec.group_map),
          spec.group_size,
          spec.nested_group_size,
          spec.dialect,
          spec.dialect_flags,
          spec.residue_bytes,
          0};
}

PackedSpec spec_from_ints(std::span<const std::int64_t> ints) {
  if (ints.size() != kSpecInts) {
    fail_spec(Errc::kCorrupt, "length", static_cast<std::int64_t>(ints.size()),
              std::to_string(kSpecInts));
  }
  if (ints[0] != kLayoutVersion) {
    fail_spec(Errc::kCorrupt, "layout version", ints[0], std::to_string(kLayoutVersion));
  }
  check_range(Errc::kCorrupt, "bits", ints[3], 1, 8);
  check_range(Errc::kCorrupt, "code_map", ints[4], 0, static_cast<int>(CodeMap::kE5M2));
  check_range(Errc::kCorrupt, "centre", ints[5], -255, 255);
  check_range(Errc::kCorrupt, "offset", ints[6], 0, static_cast<int>(Offset::kOver127));
  check_range(Errc::kCorrupt, "scale", ints[7], 0, static_cast<int>(ScaleSource::kSuperU4));
  check_range(Errc::kCorrupt, "value_dtype", ints[8], 0, static_cast<int>(DType::kF8E8M0));
  check_range(Errc::kCorrupt, "group_map", ints[9], 0, static_cast<int>(GroupMap::kColumnBlocks));
  check_range(Errc::kCorrupt, "dialect", ints[12], 0, 1 << 20);
  check_range(Errc::kCorrupt, "residue_bytes", ints[14], 0, kMaxResidueBytes);
  check_range(Errc::kCorrupt, "reserved", ints[15], 0, 0);
  const PackedSpec spec{.rows = ints[1],
                        .cols = ints[2],
                        .bits = static_cast<int>(ints[3]),
                        .code_map = static_cast<CodeMap>(ints[4]),
                        .centre = static_cast<int>(ints[5]),
                        .offset = static_cast<Offset>(ints[6]),
                        .scale = static_cast<ScaleSource>(ints[7]),
                        .value_dtype = static_cast<DType>(ints[8]),
                        .group_map = static_cast<GroupMap>(ints[9]),
                        .group_size = ints[10],
                        .nested_group_size = ints[11],
                        .dialect = static_cast<int>(ints[12]),
                        .dialect_flags = ints[13],
                        .residue_bytes = ints[14]};
  validate_spec(spec);
  return spec;
}

namespace {

void check_width(const PackedSpec& spec) {
  if (!is_width(spec.bits)) fail_spec(Errc::kConfig, "bits", spec.bits, kWidthNames);
  const bool float8 = spec.code_map == CodeMap::kE4M3 || spec.code_map == CodeMap::kE5M2;
  if (float8 && spec.bits != 8) fail_spec(Errc::kConfig, "bits", spec.bits, "8 with 8-bit floats");
  if (spec.code_map != CodeMap::kInteger && !float8 && spec.bits != 4) {
    fail_spec(Errc::kConfig, "bits", spec.bits, "4 with a code map of 16 values");
  }
  check_range(Errc::kConfig, "centre", spec.centre, -255, 255);
}

/// Which offsets each scale source can go with.
void check_offset(const PackedSpec& spec) {
  const auto refuse = [&spec](const char* expected) {
    fail_spec(Errc::kConfig, "offset", static_cast<int>(spec.offset), expected);
  };
  const bool none = spec.offset == Offset::kNone;
  switch (spec.scale) {
    case ScaleSource::kF32:
    case ScaleSource::kF16:
    case ScaleSource::kBF16:
      return;
    case ScaleSource::kNestedU8:
      if (!none) refuse("none with nested scales");
      return;
    case ScaleSource::kE8M0:
    case ScaleSource::kE4M3:
      if (!none) refuse("none with 8-bit float scales");
      return;
    case ScaleSource::kSuperU8:
      if (spec.offset == Offset::kOver127) refuse("another one with super-blocks");
      return;
    case ScaleSource::kSuperI8:
      if (!none) refuse("none with signed sub-scales");
      return;
    case ScaleSource::kSuperU4:
      if (!stores_offsets(spec.offset)) refuse("a stored one with 4-bit sub-scales");
      return;
  }
}

/// Which weights can share a scale, given the shape and the scale source.
void check_group_map(const PackedSpec& spec, std::int64_t numel) {
  if (spec.group_map != GroupMap::kRowRuns && !is_plain(spec.scale)) {
    fail(Errc::kConfig, "packed spec: group_map is " +
                            std::string(spec.group_map == GroupMap::kColumnRuns ? "column runs"
                                                                                : "column blocks") +
                            ", expected row runs with two-level scales");
  }
  if (spec.group_map == GroupMap::kColumnRuns && numel % spec.group_size != 0) {
    fail_spec(Errc::kShape, "group_size", spec.group_size,
              "a divisor of " + std::to_string(numel) + " elements with column runs");
  }
  if (spec.group_map == GroupMap::kColumnBlocks && spec.rows % spec.group_size != 0) {
    fail_spec(Errc::kShape, "group_size", spec.group_size,
              "a divisor of " + std::to_string(spec.rows) + " rows with column blocks");
  }
  if (is_super(spec.scale) && spec.cols % (spec.group_size * spec.nested_group_size) != 0) {
    fail_spec(Errc::kShape, "cols", spec.cols,
              "whole super-blocks of " + std::to_string(spec.group_size * spec.nested_group_size));
  }
}

}  // namespace

void validate_spec(const PackedSpec& spec) {
  check_range(Errc::kShape, "rows", spec.rows, 0, kMaxCols);
  check_range(Errc::kShape, "cols", spec.cols, 1, kMaxCols);
  const std::int64_t numel = checked_mul(spec.rows, spec.cols, "packed spec: rows * cols");
  checked_mul(numel, 16, "packed spec: bytes");
  check_width(spec);
  if (!is_weight_dtype(spec.value_dtype)) {
    fail(Errc::kConfig, "packed spec: value_dtype is " + std::string(dtype_name(spec.value_dtype)) +
                            ", expected f32, f16 or bf16");
  }
  check_range(Errc::kConfig, "group_size", spec.group_size, 1, kMaxGroupSize);
  check_range(Errc::kConfig, "nested_group_size", spec.nested_group_size, 1, kMaxNestedGroupSize);
  check_range(Errc::kConfig, "residue_bytes", spec.residue_bytes, 0, kMaxResidueBytes);
  check_offset(spec);
  check_group_map(spec, numel);
}

PackedLayout layout_of(const PackedSpec& spec) {
  validate_spec(spec);
  PackedLayout layout;
  layout.code_bytes =
      checked_mul(ceil_div(spec.cols, unit_codes(spec.bits)), unit_bytes(spec.bits), "code bytes");
  checked_mul(layout.code_bytes, spec.rows, "packed spec: code bytes");
  const bool nested = spec.scale == ScaleSource::kNestedU8;
  const std::int64_t one = scale_bytes(spec.scale);
  layout.shared_bytes = (spec.code_map == CodeMap::kTable ? 16 * 4 : 0) +
                        (nested ? 4 + 256 * 4 : 0) + spec.residue_bytes;
  if (spec.group_map != GroupMap::kRowRuns) {
    layout.stat_rows = spec.rows * spec.cols / spec.group_size;
    layout.stat_bytes = (stores_offsets(spec.offset) ? 2 : 1) * one;
    return layout;
  }
  const bool crosses = spec.cols % spec.group_size != 0;
  layout.stat_rows = spec.rows;
  layout.slots = max_touched(spec.cols, spec.group_size, spec.cols);
  layout.has_header = crosses || nested;
  layout.stat_bytes = (layout.has_header ? 4 : 0) + layout.slots * one;
  if (has_offset_slots(spec)) layout.stat_bytes += layout.slots * one;
  if (nested) {
    // Rows of whole groups start at multiples of the groups per row, others anywhere.
    layout.nested_slots =
        max_touched(layout.slots, spec.nested_group_size, crosses ? 1 : layout.slots);
    layout.stat_bytes += layout.nested_slots * 4;
  } else if (is_super(spec.scale)) {
    layout.nested_slots = layout.slots / spec.nested_group_size;
    layout.stat_bytes += layout.nested_slots * (stores_offsets(spec.offset) ? 4 : 2);
  }
  checked_mul(layout.stat_bytes, spec.rows, "packed spec: statistics bytes");
  return layout;
}

std::int64_t PackedLayout::total_bytes(const PackedSpec& spec) const {
  return spec.rows * code_bytes + stat_rows * stat_bytes + shared_bytes;
}

PackedMatrix make_packed(const PackedSpec& spec) {
  const PackedLayout layout = layout_of(spec);
  PackedMatrix packed;
  packed.spec = spec;
  packed.codes.resize(static_cast<std::size_t>(spec.rows * layout.code_bytes));
  packed.stats.resize(static_cast<std::size_t>(layout.stat_rows * layout.stat_bytes));
  packed.shared.resize(static_cast<std::size_t>(layout.shared_bytes));
  return packed;
}

void check_packed(const PackedView& w) {
  const PackedLayout layout = layout_of(w.spec);
  check_size("packed matrix: codes bytes", w.codes.size(),
             static_cast<std::size_t>(w.spec.rows * layout.code_bytes));
  check_size("packed matrix: stats bytes", w.stats.size(),
             static_cast<std::size_t>(layout.stat_rows * layout.stat_bytes));
  check_size("packed matrix: shared bytes", w.shared.size(),
             static_cast<std::size_t>(layout.shared_bytes));
}

}  // namespace quantal

#include "formats/hqq/hqq_params.h"

namespace quantal::hqq {
namespace {

constexpr int kGroupShift = 8, kHighShift = 40, kDtypeShift = 48;
constexpr std::int64_t kGroupMask = 0xFFFFFFFF;

}  // namespace

std::int64_t Flags::to_int() const {
  std::int64_t bits = stored_group_size << kGroupShift;
  int at = 0;
  for (const bool flag : {optimize, round_zero, channel_wise, view_as_float, offload_meta,
                          quant_zero, quant_scale, stacked}) {
    bits |= std::int64_t{flag} << at++;
  }
  at = kHighShift;
  for (const bool flag : {ternary, no_group_size, along_columns, no_settings, no_view_facts,
                          no_offload_meta, unpacked}) {
    bits |= std::int64_t{flag} << at++;
  }
  return bits | static_cast<std::int64_t>(view_dtype) << kDtypeShift;
}

Flags Flags::from_int(std::int64_t bits) {
  const auto flag = [bits](int at) { return (bits >> at & 1) != 0; };
  return {.optimize = flag(0),
          .round_zero = flag(1),
          .channel_wise = flag(2),
          .view_as_float = flag(3),
          .offload_meta = flag(4),
          .quant_zero = flag(5),
          .quant_scale = flag(6),
          .stacked = flag(7),
          .stored_group_size = bits >> kGroupShift & kGroupMask,
          .ternary = flag(kHighShift),
          .no_group_size = flag(kHighShift + 1),
          .along_columns = flag(kHighShift + 2),
          .no_settings = flag(kHighShift + 3),
          .no_view_facts = flag(kHighShift + 4),
          .no_offload_meta = flag(kHighShift + 5),
          .unpacked = flag(kHighShift + 6),
          .view_dtype = static_cast<DType>(bits >> kDtypeShift & 0xFF)};
}

Grouping grouping_of(const PackedSpec& spec) {
  if (!Flags::from_int(spec.dialect_flags).channel_wise) return {spec.rows, spec.cols, 1};
  const std::int64_t groups = spec.rows * spec.cols / spec.group_size;
  if (spec.group_map == GroupMap::kRowRuns) return {groups, spec.group_size, groups};
  return {spec.group_size, groups, groups};
}

float max_code_of(const PackedSpec& spec) {
  if (Flags::from_int(spec.dialect_flags).ternary) return 2.0F;
  return static_cast<float>((1 << spec.bits) - 1);
}

}  // namespace quantal::hqq

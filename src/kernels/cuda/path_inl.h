// The ways in which products decode weights, chosen by the form, and the statistics that each loads
// a step ahead, so that no lane waits for memory between the codes and the product.
#pragma once

#include "kernels/cuda/halves_inl.h"
#include "kernels/cuda/table_inl.h"

namespace quantal::cuda {

enum class DecodePath : int {
  kGeneral,  ///< every form: values in float32, rounded as the form says
  kScaled,   ///< value = r(c * scale), rounded once, to the type of the activations
  kHalves,   ///< halves_inl.h
};

/// The fastest way that gives the values of `w` rounded to `kind`.
inline DecodePath decode_path(const Matrix& w, FloatKind kind) {
  if (decodes_to_halves(w, kind)) return DecodePath::kHalves;
  const bool once = w.value_kind == kind || w.value_kind == FloatKind::kF32;
  const bool two_levels = w.scale == ScaleKind::kSuperU8 || w.scale == ScaleKind::kSuperI8 ||
                          w.scale == ScaleKind::kSuperU4;
  const bool taken = w.values != Values::kNumber || w.bits == 8;
  return once && taken && !two_levels && w.offset == OffsetKind::kNone ? DecodePath::kScaled
                                                                       : DecodePath::kGeneral;
}

// ------------------------------------------------------------------ statistics

/// The bytes of a scale; of a nested one its code and its outer scale.
struct RawScale {
  std::uint32_t bits, outer;
};
QUANTAL_DEVICE RawScale load_scale(const Matrix& w, const RowStart& row, std::uint32_t slot) {
  if (w.scale == ScaleKind::kNestedU8) {
    const std::uint32_t block = w.nested_group.quotient(row.nested_phase + slot);
    const std::uint8_t* at = row.stats + w.slots + 4 * block;
    if ((reinterpret_cast<std::uintptr_t>(at) & 3U) == 0) {
      return {row.stats[slot], *reinterpret_cast<const std::uint32_t*>(at)};
    }
    return {row.stats[slot], half_at(at) | half_at(at + 2) << 16};
  }
  if (w.scale == ScaleKind::kF32) {
    return {reinterpret_cast<const std::uint32_t*>(row.stats)[slot], 0};
  }
  if (w.scale == ScaleKind::kF16 || w.scale == ScaleKind::kBF16) {
    return {load_half(reinterpret_cast<const std::uint16_t*>(row.stats) + slot), 0};
  }
  return {row.stats[slot], 0};
}
/// The scale itself: slot_statistics of the same slot.
QUANTAL_DEVICE float scale_of(const Matrix& w, const RawScale& raw) {
  if (w.scale == ScaleKind::kNestedU8) {
    const float product = w.nested[1 + raw.bits] * float_of_bits(raw.outer);
    return product + w.nested[0];
  }
  if (w.scale == ScaleKind::kF32) return float_of_bits(raw.bits);
  if (w.scale == ScaleKind::kBF16) return of_bf16(static_cast<std::uint16_t>(raw.bits));
  if (w.scale == ScaleKind::kF16) return of_f16(static_cast<std::uint16_t>(raw.bits));
  return round_to(w.value_kind,
                  w.scale == ScaleKind::kE8M0 ? of_e8m0(raw.bits) : of_e4m3(raw.bits));
}

/// Whether a border of groups may lie between the chunks of a pair.
QUANTAL_DEVICE bool cuts_pairs(const Matrix& w, const RowStart& row) {
  return (row.phase | w.group.divisor) % (2 * kChunk) != 0;
}

template <DecodePath kPath>
struct RawStatistics {};  // kGeneral loads where it decodes
template <>
struct RawStatistics<DecodePath::kScaled> {
  RawScale of[2];
};
template <>
struct RawStatistics<DecodePath::kHalves> {
  RawHalves of[2];
};

/// Of both chunks of a pair, of the first alone where one group holds both. Beyond the row they are
/// those of its last chunk: x is 0 there, and where these statistics are no numbers the row's
/// product is none anyway.
template <DecodePath kPath>
QUANTAL_DEVICE RawStatistics<kPath> load_statistics(const Matrix& w, const RowStart& row,
                                                    std::uint32_t pair) {
  RawStatistics<kPath> raw{};
  if constexpr (kPath != DecodePath::kGeneral) {
    const auto load = [&](std::uint32_t slot) {
      if constexpr (kPath == DecodePath::kScaled) return load_scale(w, row, slot);
      if constexpr (kPath == DecodePath::kHalves) return load_halves(w, row, slot);
    };
    const std::uint32_t last = static_cast<std::uint32_t>(w.cols) - kChunk;
    const std::uint32_t col = 2 * pair * kChunk;
    raw.of[0] = load(w.group.quotient(row.phase + (col < last ? col : last)));
    if (cuts_pairs(w, row)) {  // else of[1] is of[0], but a copy here would wait for the load
      const std::uint32_t next = col + kChunk;
      raw.of[1] = load(w.group.quotient(row.phase + (next < last ? next : last)));
    }
  }
  return raw;
}

}  // namespace quantal::cuda

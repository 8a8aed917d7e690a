// The kernels of one quantization, in this order: statistics of groups; rounds of a solver
// (quantize_solver_inl.h) or the second level of nested scales, where there are any; statistics as
// bytes; codes. Where weights of a group lie side by side a warp takes a group, where they lie a
// row apart a thread does, so that threads side by side read weights side by side.
#pragma once

#include "kernels/cuda/quantize_parts_inl.h"

namespace quantal::cuda {

// ------------------------------------------------------------------ groups

QUANTAL_DEVICE void store_group(const QuantizeArgs& a, std::int64_t group, const Extent& e,
                                std::int64_t size) {
  const GroupCode code = group_code(a, e, size);
  const bool fits = !makes_halves(a.how.encoder) || (is_half(code.scale) && is_half(code.offset));
  if (!e.finite || !fits) *a.refused = 1;
  a.scratch.scale[group] = code.scale;
  a.scratch.offset[group] = code.offset;
  a.scratch.terms[group] = static_cast<double>(code.scale);
}

/// A warp takes a group; lane l its weights l, l + 32, ...
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_groups(const QuantizeArgs a) {
  const int lane = thread_index() % kWarp;
  const std::int64_t group = quantize_thread() / kWarp;
  if (group >= a.groups) return;
  const std::int64_t begin = group * a.group_size, all = a.rows * a.cols;
  const std::int64_t end = begin + a.group_size < all ? begin + a.group_size : all;
  Extent e = no_extent();
  for (std::int64_t i = begin + lane; i < end; i += kWarp) {
    const float w = weight_at(a, i);
    const auto at = static_cast<std::int32_t>(i - begin);
    e = joined(e, {w, w, at, at, is_finite(w)});
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Extent other = {shuffle_xor(e.low, mask), shuffle_xor(e.high, mask),
                          shuffle_xor(e.low_at, mask), shuffle_xor(e.high_at, mask),
                          shuffle_xor(e.finite ? 1 : 0, mask) != 0};
    e = joined(e, other);
  }
  if (lane == 0) store_group(a, group, e, end - begin);
}

/// A thread takes a group whose weights lie apart.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_column_groups(const QuantizeArgs a) {
  const std::int64_t group = quantize_thread();
  if (group >= a.groups) return;
  const GroupRun run = group_run(a, group);
  Extent e = no_extent();
  for (std::int64_t i = 0; i < a.group_size; ++i) {
    const float w = weight_at(a, run.begin + i * run.step);
    const auto at = static_cast<std::int32_t>(i);
    e = joined(e, {w, w, at, at, is_finite(w)});
  }
  store_group(a, group, e, a.group_size);
}

// ------------------------------------------------------------------ nested scales

/// Code of a point of [-1, 1] among 65536: the number of midpoints of the map below it.
QUANTAL_DEVICE std::uint32_t nested_code(const float* map, std::uint32_t point) {
  const float value = -1.0F + (2.0F * static_cast<float>(point)) / 65535.0F;
  std::uint32_t low = 0, high = 255;
  while (low < high) {
    const std::uint32_t middle = (low + high) / 2;
    if (0.5F * (map[middle] + map[middle + 1]) < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Second level: a warp takes a block of first-level scales less their mean.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_nested(const QuantizeArgs a) {
  const int lane = thread_index() % kWarp;
  const std::int64_t block = quantize_thread() / kWarp;
  const std::int64_t begin = block * a.nested_group_size;
  if (begin >= a.groups) return;
  const std::int64_t end =
      begin + a.nested_group_size < a.groups ? begin + a.nested_group_size : a.groups;
  const float mean = *a.scratch.best;
  float top = 0.0F;
  for (std::int64_t g = begin + lane; g < end; g += kWarp) {
    top = larger(magnitude(a.scratch.scale[g] - mean), top);
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) top = larger(top, shuffle_xor(top, mask));
  const float reciprocal = 1.0F / top;
  const auto* map = reinterpret_cast<const float*>(a.shared) + 1;
  for (std::int64_t g = begin + lane; g < end; g += kWarp) {
    const float s = smaller(larger((a.scratch.scale[g] - mean) * reciprocal, -1.0F), 1.0F);
    const float unit = (s + 1.0F) * 0.5F;
    // The product and the sum round once: both are exact in double.
    const auto index = static_cast<float>(static_cast<double>(unit) * 65535.0 + 0.5);
    a.scratch.nested[g] = static_cast<std::uint8_t>(
        top == 0.0F ? 0U : nested_code(map, static_cast<std::uint32_t>(index) & 0xFFFFU));
  }
  if (lane == 0) a.scratch.absmax2[block] = top;
}

/// shared: the mean, then the map.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_shared(const QuantizeArgs a) {
  auto* shared = reinterpret_cast<float*>(a.shared);
  shared[1 + thread_index()] = a.how.nested_map[thread_index()];
  if (thread_index() == 0) shared[0] = *a.scratch.best;
}

// ------------------------------------------------------------------ bytes

QUANTAL_DEVICE float stored_scale(const QuantizeArgs& a, std::int64_t group) {
  const float scale = a.scratch.scale[group];
  return a.how.encoder == Encoder::kAffine ? 1.0F / scale : scale;
}

/// Statistics of a row as quantal/packed.h lays them out; a thread takes a slot. Unused slots are
/// 0.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_stats(const QuantizeArgs a) {
  const std::int64_t item = quantize_thread();
  const std::int64_t row = item / a.slots, slot = item % a.slots;
  if (row >= a.rows) return;
  const std::int64_t start = row * a.cols, phase = start % a.group_size;
  const std::int64_t first = start / a.group_size;
  const std::int64_t count = (phase + a.cols + a.group_size - 1) / a.group_size;
  const bool nested = a.scale_kind == ScaleKind::kNestedU8;
  std::uint8_t* stats = a.stats + row * a.stat_bytes;
  const std::int64_t nested_phase = nested ? first % a.nested_group_size : 0;
  if (a.has_header) {
    if (slot == 0) store_word(stats, static_cast<std::uint32_t>(phase | nested_phase << 24));
    stats += 4;
  }
  const bool used = slot < count;
  if (nested) {
    stats[slot] = used ? a.scratch.nested[first + slot] : 0;
    const std::int64_t blocks =
        (nested_phase + count + a.nested_group_size - 1) / a.nested_group_size;
    for (std::int64_t b = slot; b < a.nested_slots; b += a.slots) {
      const float v = b < blocks ? a.scratch.absmax2[first / a.nested_group_size + b] : 0.0F;
      store_word(stats + a.slots + 4 * b, bits_of_float(v));
    }
    return;
  }
  if (a.scale_kind == ScaleKind::kE8M0 || a.scale_kind == ScaleKind::kE4M3) {
    stats[slot] = static_cast<std::uint8_t>(used ? a.scratch.offset[first + slot] : 0.0F);
    return;
  }
  const auto kind = static_cast<FloatKind>(a.scale_kind);
  store_float(kind, stats, slot, used ? stored_scale(a, first + slot) : 0.0F);
  if (a.has_offsets) {
    store_float(kind, stats, a.slots + slot, used ? a.scratch.offset[first + slot] : 0.0F);
  }
}

/// Statistics of groups that rows share; a thread takes a group.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_column_stats(const QuantizeArgs a) {
  const std::int64_t group = quantize_thread();
  if (group >= a.groups) return;
  std::uint8_t* stats = a.stats + group * a.stat_bytes;
  const auto kind = static_cast<FloatKind>(a.scale_kind);
  store_float(kind, stats, 0, stored_scale(a, group));
  if (a.has_offsets) store_float(kind, stats, 1, a.scratch.offset[group]);
}

/// The groups of weights that follow each other in a row.
struct GroupWalk {
  std::int64_t group, left, length, wrap;

  QUANTAL_DEVICE bool step() {
    if (--left > 0) return false;
    left = length;
    if (++group == wrap) group = 0;
    return true;
  }
};
QUANTAL_DEVICE GroupWalk walk_from(const QuantizeArgs& a, std::int64_t row, std::int64_t col) {
  const std::int64_t at = row * a.cols + col;
  switch (a.group_map) {
    case GroupKind::kColumnRuns:
      return {at % a.groups, 1, 1, a.groups};
    case GroupKind::kColumnBlocks:
      return {row / a.group_size * a.cols + col, 1, 1, a.groups};
    default:
      return {at / a.group_size, a.group_size - at % a.group_size, a.group_size, a.groups};
  }
}

/// Codes of a chunk, 0 beyond the row.
template <Encoder kEncoder, int kBits>
QUANTAL_DEVICE Codes16 encode_chunk(const QuantizeArgs& a, std::int64_t row, std::int64_t chunk) {
  Codes16 out = {{0, 0, 0, 0}};
  const std::int64_t begin = row * a.cols + chunk * kChunk;
  const std::int64_t left = a.cols - chunk * kChunk;
  if (left <= 0) return out;
  GroupWalk walk = walk_from(a, row, chunk * kChunk);
  GroupCode code = {a.scratch.scale[walk.group], a.scratch.offset[walk.group]};
  QUANTAL_UNROLL
  for (int j = 0; j < kChunk; ++j) {
    if (j >= left) break;
    out.w[j / 4] |= code_of<kEncoder, kBits>(a, weight_at(a, begin + j), code) << (8 * (j % 4));
    if (walk.step()) code = {a.scratch.scale[walk.group], a.scratch.offset[walk.group]};
  }
  return out;
}

/// A thread makes a strip of a row.
template <Encoder kEncoder>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_codes(const QuantizeArgs a) {
  const std::int64_t strips = a.code_bytes / 16, item = quantize_thread();
  const std::int64_t row = item / strips, strip = item % strips;
  if (row >= a.rows) return;
  Words4 out{};
  with_width(a.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    if constexpr (makes_width(kEncoder, kBits)) {
      out = make_strip<kBits>(
          strip, [&](std::int64_t chunk) { return encode_chunk<kEncoder, kBits>(a, row, chunk); });
    }
  });
  *reinterpret_cast<Words4*>(a.codes + row * a.code_bytes + strip * 16) = out;
}

}  // namespace quantal::cuda

// Searches for the scales of short groups: w ~ scale * table, and super-blocks of 256 weights. The
// steps between the passes are those of kernels/block_fit.h, sums are added in the CPU's order.
#pragma once

#include "kernels/block_fit.h"
#include "kernels/cuda/quantize_parts_inl.h"

namespace quantal::cuda {

// ------------------------------------------------------------------ a table

/// The extent of a group of 32 whose lane has `w`; all lanes get it.
QUANTAL_DEVICE Extent warp_extent(float w) {
  const int lane = thread_index() % kWarp;
  Extent e = {w, w, lane, lane, is_finite(w)};
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    e = joined(e, {shuffle_xor(e.low, mask), shuffle_xor(e.high, mask), shuffle_xor(e.low_at, mask),
                   shuffle_xor(e.high_at, mask), shuffle_xor(e.finite ? 1 : 0, mask) != 0});
  }
  return e;
}

/// Least squares for the codes of one step width.
struct TableFit {
  double gain;  ///< sum of squares that it explains; -1: none
  float scale;
};
QUANTAL_DEVICE TableFit table_fit(const QuantizeArgs& a, std::int64_t begin, float factor) {
  double wt = 0, tt = 0;
  for (int i = 0; i < kWarp; ++i) {
    const float w = weight_at(a, begin + i);
    const float s = smaller(larger(w * factor, -1.0F), 1.0F);
    float value = a.how.values[0];
    QUANTAL_UNROLL
    for (int k = 0; k < 15; ++k) value = a.how.thresholds[k] < s ? a.how.values[k + 1] : value;
    const double t = value;
    wt += static_cast<double>(w) * t;
    tt += t * t;
  }
  const double gain = wt * wt / tt;
  if (!(gain > -1.0)) return {-1.0, 0.0F};
  return {gain, static_cast<float>(wt / tt)};
}

/// kFitTable: a warp takes a group, each lane one of the step widths that put the extreme weight
/// near an end of the table. Of equal gains the first step's scale is taken.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_fit_table_kernel(const QuantizeArgs a) {
  constexpr int kSteps = 2 * kTableSteps + 1;
  static_assert(2 * kSteps <= kWarp);
  const int lane = thread_index() % kWarp;
  const std::int64_t group = quantize_thread() / kWarp;
  if (group >= a.groups) return;
  const Extent e = warp_extent(weight_at(a, group * kWarp + lane));
  const float extreme = extreme_of(e);
  const float end = lane < kSteps ? a.how.values[0] : a.how.values[15];
  const auto step = static_cast<float>(lane % kSteps - kTableSteps);
  TableFit best = table_fit(a, group * kWarp, (end + step) / extreme / 127.0F);
  if (lane >= 2 * kSteps) best = {-1.0, 0.0F};
  int from = lane;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const TableFit other = {shuffle_xor(best.gain, mask), shuffle_xor(best.scale, mask)};
    const int other_from = shuffle_xor(from, mask);
    if (other.gain > best.gain || (other.gain == best.gain && other_from < from)) {
      best = other;
      from = other_from;
    }
  }
  if (lane != 0) return;
  const bool flat = extreme == 0.0F || !is_finite(127.0F / extreme);
  const float scale = flat ? 0.0F : best.scale;
  if (!e.finite || !is_half(scale)) *a.refused = 1;
  a.scratch.scale[group] = round_to<FloatKind::kF16>(scale);
  a.scratch.offset[group] = 0.0F;
}

// ------------------------------------------------------------------ super-blocks

inline constexpr int kSuperThreads = 128;

/// Codes one per byte, sub-scales and sub-offsets of a super-block.
struct SuperParts {
  std::uint32_t codes[kSuperWeights / 4];
  std::uint8_t scales[16], offsets[16];
};
/// What a warp keeps in shared memory.
struct SuperBlock {
  float w[kSuperWeights];
  float scale[16], shift[16], error[16];  ///< of the sub-blocks' own fits; of their codes
  SuperParts parts[2];
};
static_assert(sizeof(SuperBlock) % 16 == 0);

inline Geometry super_geometry(std::int64_t super_blocks) {
  constexpr std::int64_t kWarps = kSuperThreads / kWarp;
  return {.blocks_x = (super_blocks + kWarps - 1) / kWarps,
          .threads = kSuperThreads,
          .shared_bytes = kWarps * static_cast<std::int64_t>(sizeof(SuperBlock))};
}

/// Half a warp takes a sub-block, lane l of it the weights l, l + 16; sums over lanes are added as
/// l
/// += l + 8, 4, 2, 1.
template <int kBits>
struct Super {
  static constexpr bool kShifted = kBits != 6;
  static constexpr int kHalf = kWarp / 2;
  static constexpr int kSub = kShifted ? 32 : 16;  // weights of a sub-block
  static constexpr int kSubs = kSuperWeights / kSub;
  static constexpr int kCount = kSub / kHalf;  // weights of a lane
  static constexpr int kCentre = kShifted ? 0 : 32;
  static constexpr float kLow = -kCentre, kHigh = (1 << kBits) - 1 - kCentre;
  static constexpr int kLeast = kShifted ? 0 : -128;  // sub-scales
  static constexpr int kMost = kShifted ? kMostSubScale : 127;

  struct Weights {
    float at[kCount];
  };

  static QUANTAL_DEVICE int lane() { return thread_index() % kHalf; }
  /// The half's sub-block of those number 2 pair and 2 pair + 1.
  static QUANTAL_DEVICE int sub_block(int pair) {
    return 2 * pair + thread_index() % kWarp / kHalf;
  }
  static QUANTAL_DEVICE Weights weights(const SuperBlock& s, int sub) {
    Weights w{};
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) w.at[i] = s.w[sub * kSub + i * kHalf + lane()];
    return w;
  }
  static QUANTAL_DEVICE float added(float v) {
    for (int mask = kHalf / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
  }
  static QUANTAL_DEVICE float nearest(float x) { return rounded(smaller(larger(x, kLow), kHigh)); }

  // ---------------------------------------------------------------- the fit of a sub-block

  /// Sums for the codes nearest((w + shift) * inv); `s` holds those of w.
  static QUANTAL_DEVICE FitSums sums(const Weights& w, FitSums s, float shift, float inv) {
    float q = 0, qq = 0, wq = 0;
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float code = nearest((w.at[i] + shift) * inv);
      q += code;
      qq += code * code;
      wq += w.at[i] * code;
    }
    s.q = static_cast<double>(added(q));
    s.qq = static_cast<double>(added(qq));
    s.wq = static_cast<double>(added(wq));
    return s;
  }
  static QUANTAL_DEVICE FitSums weight_sums(const Weights& w) {
    float sum = 0, squares = 0;
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      sum += w.at[i];
      squares += w.at[i] * w.at[i];
    }
    return {.n = kSub,
            .w = static_cast<double>(added(sum)),
            .ww = static_cast<double>(added(squares)),
            .q = 0,
            .qq = 0,
            .wq = 0};
  }

  /// What the step widths are reckoned from: the range and its low end, or the extreme weight.
  struct Ends {
    float width, low;
  };
  static QUANTAL_DEVICE Ends ends(const Weights& w) {
    Extent e = no_extent();
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int at = i * kHalf + lane();
      e = joined(e, {w.at[i], w.at[i], at, at, true});
    }
    for (int mask = kHalf / 2; mask > 0; mask /= 2) {
      e = joined(e, {shuffle_xor(e.low, mask), shuffle_xor(e.high, mask),
                     shuffle_xor(e.low_at, mask), shuffle_xor(e.high_at, mask), true});
    }
    const float low = e.low < 0.0F ? e.low : 0.0F;
    return kShifted ? Ends{e.high - low, low} : Ends{extreme_of(e), 0.0F};
  }

  static QUANTAL_DEVICE ShiftedFit fit(const Weights& w) {
    const Ends end = ends(w);
    const FitSums of_weights = weight_sums(w);
    ScoredFit best = {0, 0, double_infinity()};
    const auto consider = [&](float shift, float inv) {
      const FitSums s = sums(w, of_weights, shift, inv);
      const ScoredFit next = kShifted ? best_shifted(s) : best_symmetric(s);
      if (next.error < best.error) best = next;
    };
    for (int step = 0; step < kFitSteps; ++step) {
      const float codes = kShifted ? kHigh + fit_offset(step) : kLow - fit_offset(step);
      consider(-end.low, codes / end.width);
    }
    for (int round = 0; round < kFitRounds; ++round) {
      consider(static_cast<float>(best.shift), finite_inverse(static_cast<float>(best.scale)));
    }
    if (finite_inverse(end.width) == 0.0F) return {0.0F, -end.low};
    return {static_cast<float>(best.scale), static_cast<float>(best.shift)};
  }

  // ---------------------------------------------------------------- sub-scales and codes

  /// Sum of squares of w - (scale * code - shift).
  static QUANTAL_DEVICE float error(const Weights& w, float scale, float shift) {
    const float inv = finite_inverse(scale);
    float sum = 0;
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float d = w.at[i] - (scale * nearest((w.at[i] + shift) * inv) - shift);
      sum += d * d;
    }
    return added(sum);
  }

  /// The integer in [low, high] nearest to value / unit; 0 where the unit is 0.
  static QUANTAL_DEVICE int nearest_step(float value, float unit, int low, int high) {
    if (unit == 0.0F) return 0;
    const float steps = rounded(value / unit);
    return static_cast<int>(
        smaller(larger(steps, static_cast<float>(low)), static_cast<float>(high)));
  }

  /// Super-scale and super-offset as they are stored, widened.
  struct Supers {
    float scale, offset;
  };

  /// Sub-scale and sub-offset of the half's sub-block, the best of the neighbours, and its codes.
  static QUANTAL_DEVICE void choose_one(SuperBlock& s, SuperParts& parts, Supers super, int sub) {
    const Weights w = weights(s, sub);
    const int scale = nearest_step(s.scale[sub], super.scale, kLeast, kMost);
    const int offset = kShifted ? nearest_step(s.shift[sub], super.offset, 0, kMost) : 0;
    constexpr int kAround = kShifted ? kNeighbours : 0;
    float best = float_of_bits(0x7F800000U);
    int best_scale = 0, best_offset = 0;
    for (int u = scale - kNeighbours; u <= scale + kNeighbours; ++u) {
      for (int m = offset - kAround; m <= offset + kAround; ++m) {
        // Lanes of both halves reach the sums, so that none leaves where the other goes on.
        const float e =
            error(w, super.scale * static_cast<float>(u), super.offset * static_cast<float>(m));
        const bool legal = u >= kLeast && u <= kMost && m >= 0 && m <= kMost;
        if (!legal || !(e < best)) continue;
        best = e;
        best_scale = u;
        best_offset = m;
      }
    }
    const float step = super.scale * static_cast<float>(best_scale);
    const float shift = super.offset * static_cast<float>(best_offset), inv = finite_inverse(step);
    auto* codes = reinterpret_cast<std::uint8_t*>(parts.codes) + sub * kSub;
    QUANTAL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float q = nearest((w.at[i] + shift) * inv);
      codes[i * kHalf + lane()] = static_cast<std::uint8_t>(static_cast<int>(q) + kCentre);
    }
    if (lane() != 0) return;
    parts.scales[sub] = static_cast<std::uint8_t>(best_scale);
    parts.offsets[sub] = static_cast<std::uint8_t>(best_offset);
    s.error[sub] = best;
  }
  /// The same of all sub-blocks; returns the error of the super-block.
  static QUANTAL_DEVICE double choose(SuperBlock& s, SuperParts& parts, Supers super) {
    for (int pair = 0; pair < kSubs / 2; ++pair) choose_one(s, parts, super, sub_block(pair));
    warp_sync();
    double sum = 0;
    for (int j = 0; j < kSubs; ++j) sum += static_cast<double>(s.error[j]);
    return sum;
  }

  /// Super-scales that fit codes and sub-scales best. Even lanes add the products with w and the
  /// codes, odd ones those with w and the offsets, in the order of the weights.
  static QUANTAL_DEVICE ShiftedFit refit(const SuperBlock& s, const SuperParts& parts) {
    const auto* codes = reinterpret_cast<const std::uint8_t*>(parts.codes);
    const bool odd = thread_index() % 2 != 0;
    double mine = 0;
    SuperFit super;
    for (int i = 0; i < kSuperWeights; ++i) {
      int scale = parts.scales[i / kSub];
      if (!kShifted && scale > 127) scale -= 256;
      const double a = scale * (static_cast<int>(codes[i]) - kCentre);
      const double b = kShifted ? parts.offsets[i / kSub] : 0;
      super.aa += a * a;
      super.ab += a * b;
      super.bb += b * b;
      mine += static_cast<double>(s.w[i]) * (odd ? b : a);
    }
    const double other = shuffle_xor(mine, 1);
    super.wa = odd ? other : mine;
    super.wb = odd ? mine : other;
    ShiftedFit best = super.solve();
    if (kShifted && best.scale < 0.0F) best.scale = 0.0F;
    if (kShifted && best.shift < 0.0F) best.shift = 0.0F;
    return best;
  }

  // ---------------------------------------------------------------- the whole

  /// Fits all sub-blocks; the super-scales that hold the largest of them.
  static QUANTAL_DEVICE ShiftedFit fit_all(SuperBlock& s) {
    for (int pair = 0; pair < kSubs / 2; ++pair) {
      const int sub = sub_block(pair);
      const ShiftedFit own = fit(weights(s, sub));
      if (lane() == 0) {
        s.scale[sub] = own.scale;
        s.shift[sub] = own.shift;
      }
    }
    warp_sync();
    float largest = 0.0F, deepest = 0.0F;
    for (int j = 0; j < kSubs; ++j) {
      const float scale = s.scale[j];
      if constexpr (kShifted) {
        largest = larger(scale, largest);
        deepest = larger(s.shift[j], deepest);
      } else {
        largest = magnitude(scale) > magnitude(largest) ? scale : largest;
      }
    }
    const auto steps = static_cast<float>(kShifted ? kMostSubScale : -128);
    return {largest / steps, deepest / steps};
  }

  /// Encodes the weights of `s`; returns which of its parts is the result, or -1 if a super-scale
  /// is no binary16. `scale` and `offset` are what is stored.
  static QUANTAL_DEVICE int encode(SuperBlock& s, std::uint16_t& scale, std::uint16_t& offset) {
    const ShiftedFit first = fit_all(s);
    if (!is_half(first.scale) || !is_half(first.shift)) return -1;
    scale = f16_of(first.scale);
    offset = f16_of(first.shift);
    double error = choose(s, s.parts[0], {of_f16(scale), of_f16(offset)});
    int kept = 0;
    for (int round = 0; round < kSuperRounds; ++round) {
      const ShiftedFit better = refit(s, s.parts[kept]);
      if (!is_half(better.scale) || !is_half(better.shift)) break;
      const std::uint16_t next_scale = f16_of(better.scale), next_offset = f16_of(better.shift);
      const double next = choose(s, s.parts[1 - kept], {of_f16(next_scale), of_f16(next_offset)});
      if (!(next < error)) break;
      error = next;
      kept = 1 - kept;
      scale = next_scale;
      offset = next_offset;
    }
    return kept;
  }
};

/// Reads the weights of a super-block; false if one is not finite or too large for a search.
QUANTAL_DEVICE bool load_super(const QuantizeArgs& a, std::int64_t begin, float* to) {
  bool good = true;
  for (int i = thread_index() % kWarp; i < kSuperWeights; i += kWarp) {
    const float w = weight_at(a, begin + i);
    good = good && magnitude(w) <= kLargestSearched;
    to[i] = w;
  }
  int bad = good ? 0 : 1;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) bad |= shuffle_xor(bad, mask);
  warp_sync();
  return bad == 0;
}

/// kFitSuper: a warp takes a super-block, from weights to bytes.
template <int kBits>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kSuperThreads, 1)
    quantize_super_kernel(const QuantizeArgs a) {
  using S = Super<kBits>;
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const std::int64_t item = block_x() * (kSuperThreads / kWarp) + warp;
  const std::int64_t per_row = a.cols / kSuperWeights, row = item / per_row, at = item % per_row;
  if (row >= a.rows) return;
  SuperBlock& s = reinterpret_cast<SuperBlock*>(shared_memory())[warp];
  std::uint16_t scale = 0, offset = 0;
  int kept = -1;
  if (load_super(a, item * kSuperWeights, s.w)) kept = S::encode(s, scale, offset);
  if (kept < 0) {
    *a.refused = 1;
    return;
  }
  warp_sync();
  const SuperParts& parts = s.parts[kept];
  std::uint8_t* stats = a.stats + row * a.stat_bytes;
  std::uint8_t* supers = stats + (S::kShifted ? 2 : 1) * a.slots;
  if (lane < S::kSubs) {
    stats[at * S::kSubs + lane] = parts.scales[lane];
    if (S::kShifted) stats[a.slots + at * S::kSubs + lane] = parts.offsets[lane];
  }
  if (lane == 0) store_half(supers + 2 * at, scale);
  if (S::kShifted && lane == 0) store_half(supers + 2 * (a.nested_slots + at), offset);
  constexpr int kStrips = kSuperWeights * kBits / 8 / 16;
  if (lane >= kStrips) return;
  auto* codes = reinterpret_cast<Words4*>(a.codes + row * a.code_bytes) + at * kStrips;
  codes[lane] = make_strip<kBits>(lane, [&](std::int64_t chunk) {
    const std::uint32_t* from = parts.codes + 4 * chunk;
    return Codes16{{from[0], from[1], from[2], from[3]}};
  });
}

}  // namespace quantal::cuda

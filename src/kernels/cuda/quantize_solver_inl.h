// Rounds of the half-quadratic solvers, which stop on the device, and sums over the matrix in the
// order of the CPU: those of a group, of a row's groups, of the rows.
#pragma once

#include "kernels/cuda/quantize_inl.h"

namespace quantal::cuda {

inline Geometry start_geometry() { return {.blocks_x = 1, .threads = kWarp}; }

QUANTAL_KERNEL void quantize_start(const QuantizeArgs a) {
  if (thread_index() != 0) return;
  *a.refused = 0;
  *a.scratch.done = 0;
  *a.scratch.best = float_of_bits(0x7F800000U);
}

// ------------------------------------------------------------------ a round

/// Sums of a group: of the terms of its offset, and of its residuals.
struct GroupSums {
  double offset = 0, residual = 0;

  QUANTAL_DEVICE void add(SolverTerms t) {
    offset += static_cast<double>(t.zero);
    residual += static_cast<double>(t.residual);
  }
};
template <Encoder kEncoder>
QUANTAL_DEVICE SolverTerms terms_of(const QuantizeArgs& a, float w, GroupCode code) {
  return kEncoder == Encoder::kAffine ? solver_terms(w, code, a.top) : shrink_terms(a, w, code);
}
/// kAffine keeps the offsets of every round, kShifted those that quantize_accept takes.
template <Encoder kEncoder>
QUANTAL_DEVICE void store_sums(const QuantizeArgs& a, std::int64_t group, const GroupSums& sums) {
  const auto mean = static_cast<float>(sums.offset / static_cast<double>(a.group_size));
  if constexpr (kEncoder == Encoder::kAffine) {
    a.scratch.offset[group] = mean;
  } else {
    a.scratch.next[group] = round_to(a.value_kind, mean);
  }
  a.scratch.terms[group] = sums.residual;
}

/// One step of the solver; half a warp takes a group, lane l its weights l, l + 16, ... in order,
/// and lanes are added as l += l + 8, 4, 2, 1: the order of kernels/quantize.h and rounded.h.
template <Encoder kEncoder>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_solve(const QuantizeArgs a) {
  constexpr int kLanes = 16;
  if (*a.scratch.done != 0) return;
  const int lane = thread_index() % kLanes;
  const std::int64_t group = quantize_thread() / kLanes;
  const bool inside = group < a.groups;  // both halves of a warp reach the shuffles
  GroupSums sums;
  if (inside) {
    const GroupCode code = {a.scratch.scale[group], a.scratch.offset[group]};
    for (std::int64_t i = lane; i < a.group_size; i += kLanes) {
      sums.add(terms_of<kEncoder>(a, weight_at(a, group * a.group_size + i), code));
    }
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sums.offset += shuffle_xor(sums.offset, mask);
    sums.residual += shuffle_xor(sums.residual, mask);
  }
  if (lane == 0 && inside) store_sums<kEncoder>(a, group, sums);
}

/// The same of groups whose weights lie apart; a thread takes a group and adds in order.
template <Encoder kEncoder>
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_column_solve(const QuantizeArgs a) {
  const std::int64_t group = quantize_thread();
  if (group >= a.groups || *a.scratch.done != 0) return;
  const GroupCode code = {a.scratch.scale[group], a.scratch.offset[group]};
  const GroupRun run = group_run(a, group);
  GroupSums sums;
  for (std::int64_t i = 0; i < a.group_size; ++i) {
    sums.add(terms_of<kEncoder>(a, weight_at(a, run.begin + i * run.step), code));
  }
  store_sums<kEncoder>(a, group, sums);
}

/// kShifted: a round that was better than the last one keeps its offsets and goes on with the next.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_accept(const QuantizeArgs a) {
  const std::int64_t group = quantize_thread();
  if (group >= a.groups || *a.scratch.done != 0) return;
  a.scratch.kept[group] = a.scratch.offset[group];
  a.scratch.offset[group] = a.scratch.next[group];
}

/// Behind the last round: the offsets that were kept, in codes where the form has zero points.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_settle(const QuantizeArgs a) {
  const std::int64_t group = quantize_thread();
  if (group >= a.groups) return;
  const float shift = a.scratch.kept[group];
  a.scratch.offset[group] = a.how.encoder == Encoder::kRoundedZero
                                ? rounded_zero(a, a.scratch.scale[group], shift)
                                : shift;
}

// ------------------------------------------------------------------ sums over the matrix

/// Sum of the terms of a block of rows whose columns are groups, in runs of columns as the CPU's
/// tasks take them.
QUANTAL_DEVICE double block_sum(const QuantizeArgs& a, std::int64_t block) {
  const double* terms = a.scratch.terms + block * a.cols;
  double sum = 0;
  for (std::int64_t c = 0; c < a.cols;) {
    const std::int64_t end = c + kColumnChunk < a.cols ? c + kColumnChunk : a.cols;
    double part = 0;
    for (; c < end; ++c) part += terms[c];
    sum += part;
  }
  return sum;
}

/// Terms of the groups that begin in a row, added in order; a thread takes a row.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_row_sums(const QuantizeArgs a) {
  const std::int64_t row = quantize_thread();
  if (row >= a.rows || *a.scratch.done != 0) return;
  if (a.group_map == GroupKind::kColumnBlocks) {
    a.scratch.rows[row] = row % a.group_size == 0 ? block_sum(a, row / a.group_size) : 0.0;
    return;
  }
  const std::int64_t apart = a.group_map == GroupKind::kColumnRuns ? 1 : a.group_size;
  const auto first = [&](std::int64_t r) { return (r * a.cols + apart - 1) / apart; };
  const std::int64_t end = first(row + 1) < a.groups ? first(row + 1) : a.groups;
  double sum = 0;
  for (std::int64_t g = first(row); g < end; ++g) sum += a.scratch.terms[g];
  a.scratch.rows[row] = sum;
}

inline constexpr std::int64_t kStaged = 2048;
inline Geometry sum_geometry() {
  return {.blocks_x = 1, .threads = kQuantizeThreads, .shared_bytes = kStaged * 8};
}

/// What the sum over the matrix leads to. Of a solver: it stops where the mean residual did not
/// fall (that of kShifted not in its first round). Else best = mean over groups.
QUANTAL_DEVICE void decide(const QuantizeArgs& a, double sum) {
  const bool affine = a.how.encoder == Encoder::kAffine;
  const bool solver = affine || a.how.encoder != Encoder::kTable;
  const std::int64_t count = solver ? a.rows * a.cols : a.groups;
  auto mean = static_cast<float>(sum / static_cast<double>(count));
  if (solver && !affine) mean = round_to(a.value_kind, mean);
  const bool must_fall = solver && (affine || a.round_index > 0);
  if (must_fall && !(mean < *a.scratch.best)) {
    *a.scratch.done = 1;
  } else {
    *a.scratch.best = mean;
  }
}

/// Sum of all rows in order, by one thread of one block; the others bring the rows near.
QUANTAL_KERNEL void QUANTAL_KERNEL_THREADS(kQuantizeThreads, 1)
    quantize_decide(const QuantizeArgs a) {
  if (*a.scratch.done != 0) return;
  auto* staged = reinterpret_cast<double*>(shared_memory());
  double sum = 0;
  for (std::int64_t from = 0; from < a.rows; from += kStaged) {
    const std::int64_t count = a.rows - from < kStaged ? a.rows - from : kStaged;
    for (std::int64_t i = thread_index(); i < count; i += kQuantizeThreads) {
      staged[i] = a.scratch.rows[from + i];
    }
    block_sync();
    if (thread_index() == 0) {
      for (std::int64_t i = 0; i < count; ++i) sum += staged[i];
    }
    block_sync();
  }
  if (thread_index() == 0) decide(a, sum);
}

}  // namespace quantal::cuda

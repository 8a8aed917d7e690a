#include "kernels/cuda/launchers.h"
#include "kernels/cuda/quantize_solver_inl.h"
#include "quantal/core.h"

namespace quantal::cuda {
namespace {

/// Offsets of the parts of a workspace, each at a multiple of 16 bytes.
struct QuantizeParts {
  std::int64_t terms = 0, rows = 0, scale = 0, offset = 0, next = 0, kept = 0, control = 0,
               nested = 0, absmax2 = 0, end = 0;
};
QuantizeParts quantize_parts(const PackedSpec& spec) {
  constexpr const char* kWhat = "cuda quantize: workspace";
  const std::int64_t groups = ceil_div(checked_mul(spec.rows, spec.cols, kWhat), spec.group_size);
  const bool two_levels = spec.scale == ScaleSource::kNestedU8;
  const auto behind = [&](std::int64_t at, std::int64_t count, std::int64_t bytes) {
    return checked_add(at, ceil_div(checked_mul(count, bytes, kWhat), 16) * 16, kWhat);
  };
  QuantizeParts p;
  p.rows = behind(p.terms, groups, 8);
  p.scale = behind(p.rows, spec.rows, 8);
  p.offset = behind(p.scale, groups, 4);
  const bool shifts = spec.offset == Offset::kShift || spec.offset == Offset::kZeroPoint;
  p.next = behind(p.offset, groups, 4);
  p.kept = behind(p.next, shifts ? groups : 0, 4);
  p.control = behind(p.kept, shifts ? groups : 0, 4);
  p.nested = behind(p.control, 1, 16);
  p.absmax2 = behind(p.nested, two_levels ? groups : 0, 1);
  p.end = behind(p.absmax2, two_levels ? ceil_div(groups, spec.nested_group_size) : 0, 4);
  return p;
}

void start_codes(const QuantizeArgs& args, Stream stream) {
  const Geometry geometry = quantize_geometry(args.rows * (args.code_bytes / 16));
  const auto encode = [&](void (*kernel)(QuantizeArgs)) {
    start("quantize_codes", kernel, geometry, args, stream);
  };
  switch (args.how.encoder) {
    case Encoder::kTable:
      return encode(quantize_codes<Encoder::kTable>);
    case Encoder::kRowInt8:
      return encode(quantize_codes<Encoder::kRowInt8>);
    case Encoder::kAnchored:
      return encode(quantize_codes<Encoder::kAnchored>);
    case Encoder::kShifted:
      return encode(quantize_codes<Encoder::kShifted>);
    case Encoder::kRoundedZero:
      return encode(quantize_codes<Encoder::kRoundedZero>);
    case Encoder::kSymmetric:
      return encode(quantize_codes<Encoder::kSymmetric>);
    case Encoder::kAffine:
      return encode(quantize_codes<Encoder::kAffine>);
    case Encoder::kMicroscaled:
      return encode(quantize_codes<Encoder::kMicroscaled>);
    case Encoder::kExtreme:
      return encode(quantize_codes<Encoder::kExtreme>);
    case Encoder::kRange:
      return encode(quantize_codes<Encoder::kRange>);
    case Encoder::kLargest:
      return encode(quantize_codes<Encoder::kLargest>);
    case Encoder::kFitTable:
      return encode(quantize_codes<Encoder::kFitTable>);
    case Encoder::kFitSuper:
      return;  // quantize_super
  }
}

/// Mean over the matrix of the terms of its groups, or the end of the solver.
void start_sum(const QuantizeArgs& args, Stream stream) {
  start("quantize_row_sums", quantize_row_sums, quantize_geometry(args.rows), args, stream);
  start("quantize_decide", quantize_decide, sum_geometry(), args, stream);
}

/// All rounds of a solver: those behind its end do nothing.
template <Encoder kEncoder>
void start_rounds(QuantizeArgs args, Stream stream) {
  const bool runs = args.group_map == GroupKind::kRowRuns;
  for (args.round_index = 0; args.round_index < args.how.rounds; ++args.round_index) {
    if (kEncoder == Encoder::kShifted) {
      args.shrink = {.inverse_beta = args.how.inverse_beta[args.round_index],
                     .power = args.how.power,
                     .no_shrink = args.how.no_shrink[args.round_index]};
    }
    if (runs) {
      start("quantize_solve", quantize_solve<kEncoder>,
            quantize_geometry(args.groups * (kWarp / 2)), args, stream);
    } else {
      start("quantize_column_solve", quantize_column_solve<kEncoder>,
            quantize_geometry(args.groups), args, stream);
    }
    start_sum(args, stream);
    if (kEncoder == Encoder::kShifted) {
      start("quantize_accept", quantize_accept, quantize_geometry(args.groups), args, stream);
    }
  }
}

}  // namespace

std::int64_t quantize_workspace(const PackedSpec& spec) { return quantize_parts(spec).end; }

QuantizeScratch quantize_scratch(void* workspace, const PackedSpec& spec) {
  const QuantizeParts p = quantize_parts(spec);
  auto* base = static_cast<unsigned char*>(workspace);
  return {.scale = reinterpret_cast<float*>(base + p.scale),
          .offset = reinterpret_cast<float*>(base + p.offset),
          .terms = reinterpret_cast<double*>(base + p.terms),
          .rows = reinterpret_cast<double*>(base + p.rows),
          .next = reinterpret_cast<float*>(base + p.next),
          .kept = reinterpret_cast<float*>(base + p.kept),
          .best = reinterpret_cast<float*>(base + p.control),
          .done = reinterpret_cast<std::int32_t*>(base + p.control + 4),
          .nested = base + p.nested,
          .absmax2 = reinterpret_cast<float*>(base + p.absmax2)};
}

void quantize(const QuantizeArgs& args, Stream stream) {
  start("quantize_start", quantize_start, start_geometry(), args, stream);
  if (args.rows == 0) return;
  if (args.how.encoder == Encoder::kFitSuper) return quantize_super(args, stream);
  const bool runs = args.group_map == GroupKind::kRowRuns;
  if (args.how.encoder == Encoder::kFitTable) {
    quantize_fit_table(args, stream);
  } else {
    start("quantize_groups", runs ? quantize_groups : quantize_column_groups,
          quantize_geometry(args.groups * (runs ? kWarp : 1)), args, stream);
  }
  if (args.how.encoder == Encoder::kAffine) {
    start_rounds<Encoder::kAffine>(args, stream);
  } else if (optimizes_shifts(args.how.encoder) && args.how.rounds > 0) {
    start_rounds<Encoder::kShifted>(args, stream);
    start("quantize_settle", quantize_settle, quantize_geometry(args.groups), args, stream);
  }
  if (args.scale_kind == ScaleKind::kNestedU8) {
    start_sum(args, stream);
    const std::int64_t blocks = ceil_div(args.groups, args.nested_group_size);
    start("quantize_shared", quantize_shared, quantize_geometry(1), args, stream);
    start("quantize_nested", quantize_nested, quantize_geometry(blocks * kWarp), args, stream);
  }
  start("quantize_stats", runs ? quantize_stats : quantize_column_stats,
        quantize_geometry(runs ? args.rows * args.slots : args.groups), args, stream);
  start_codes(args, stream);
}

}  // namespace quantal::cuda

#include "formats/hqq/hqq_codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

/// Groups that one task handles: its sums are added in this unit, whatever the number of threads.
constexpr std::int64_t kRunsPerChunk = 256;

/// A matrix of weights seen as groups.
struct Groups {
  const PackedSpec& spec;
  WeightRun weights;
  const QuantizeKernels& kernels;
  Grouping grouping;
  float max_code;

  bool columns() const { return spec.group_map == GroupMap::kColumnRuns; }
  std::int64_t per_chunk() const { return columns() ? kColumnBlock : kRunsPerChunk; }
  std::int64_t chunks() const { return ceil_div(grouping.groups, per_chunk()); }
  std::int64_t end_of(std::int64_t chunk) const {
    return std::min(grouping.groups, (chunk + 1) * per_chunk());
  }
};

/// Initial scale and zero of a group:
///   scale = min(recip(high - low) * max_code, 2e4), 1 where the range is at most 1e-4
///   zero = -low * scale, rounded to an integer with round_zero
void initialize_group(float low, float high, float max_code, bool round_zero, float* scale,
                      float* zero) {
  const float range = high - low;
  float s = (1.0F / range) * max_code;
  if (std::fabs(range) <= kTinyRange) s = 1.0F;
  s = std::min(s, kMaxInverseScale);
  const float z = -low * s;
  *scale = s;
  *zero = round_zero ? std::nearbyint(z) : z;
}

/// Returns false if a weight of the chunk is not finite.
bool initialize_chunk(const Groups& g, std::int64_t chunk, bool round_zero, GroupParameters& p) {
  const std::int64_t begin = chunk * g.per_chunk(), end = g.end_of(chunk);
  bool finite = true;
  std::array<float, kColumnBlock> low, high;
  if (g.columns()) {
    finite = g.kernels.range_columns(g.weights.at(begin), g.grouping.rows, g.grouping.cols,
                                     end - begin, low.data(), high.data());
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const auto k = static_cast<std::size_t>(i), j = static_cast<std::size_t>(i - begin);
    if (g.columns()) {
      initialize_group(low[j], high[j], g.max_code, round_zero, &p.scale[k], &p.zero[k]);
      continue;
    }
    const Range r = g.kernels.range(g.weights.at(i * g.spec.group_size), g.spec.group_size);
    finite = finite && r.finite;
    initialize_group(r.low, r.high, g.max_code, round_zero, &p.scale[k], &p.zero[k]);
  }
  return finite;
}

/// One round over the groups of a chunk: replaces their zeros, returns their sum of residuals.
double step_chunk(const Groups& g, std::int64_t chunk, GroupParameters& p) {
  const std::int64_t begin = chunk * g.per_chunk(), end = g.end_of(chunk);
  const auto size = static_cast<double>(g.spec.group_size);
  double error = 0;
  if (g.columns()) {
    std::array<SolverSums, kColumnBlock> sums;
    g.kernels.solver_step_columns(g.weights.at(begin), g.grouping.rows, g.grouping.cols,
                                  end - begin, p.scale.data() + begin, p.zero.data() + begin,
                                  g.max_code, sums.data());
    for (std::int64_t i = begin; i < end; ++i) {
      const SolverSums& s = sums[static_cast<std::size_t>(i - begin)];
      p.zero[static_cast<std::size_t>(i)] = static_cast<float>(s.zero / size);
      error += s.error;
    }
    return error;
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const auto k = static_cast<std::size_t>(i);
    const SolverSums s =
        g.kernels.solver_step(g.weights.at(i * g.spec.group_size), g.spec.group_size,
                              {p.scale[k], p.zero[k], g.max_code});
    p.zero[k] = static_cast<float>(s.zero / size);
    error += s.error;
  }
  return error;
}

/// Codes of row `r`, one per byte.
void encode_row(const Groups& g, const GroupParameters& p, std::int64_t r, std::uint8_t* row) {
  const std::int64_t start = r * g.spec.cols, stop = start + g.spec.cols;
  for (std::int64_t at = start; at < stop;) {
    std::int64_t end = stop;
    if (g.columns()) {
      const std::int64_t first = at % g.grouping.cols;
      end = std::min(stop, at - first + g.grouping.cols);
      g.kernels.encode_affine_each(g.weights.at(at), end - at, p.scale.data() + first,
                                   p.zero.data() + first, g.max_code, row + (at - start));
    } else {
      const std::int64_t group = at / g.spec.group_size;
      end = std::min(stop, (group + 1) * g.spec.group_size);
      const auto k = static_cast<std::size_t>(group);
      g.kernels.encode_affine(g.weights.at(at), end - at, {p.scale[k], p.zero[k], g.max_code},
                              row + (at - start));
    }
    at = end;
  }
}

/// Stores 1 / scale and zero, both rounded to value_dtype.
void write_stats(const Groups& g, const GroupParameters& p, std::uint8_t* stats,
                 const Executor& executor) {
  const PackedSpec& spec = g.spec;
  const std::size_t item = dtype_size(spec.value_dtype);
  const std::size_t groups = p.scale.size();
  std::vector<std::uint8_t> scales(groups * item), zeros(groups * item);
  std::vector<float> inverse(groups);
  for (std::size_t i = 0; i < groups; ++i) inverse[i] = 1.0F / p.scale[i];
  const auto n = static_cast<std::int64_t>(groups);
  narrow_from_f32(spec.value_dtype, inverse.data(), n, scales.data());
  narrow_from_f32(spec.value_dtype, p.zero.data(), n, zeros.data());
  if (!g.columns()) {
    spread_stats(spec, {scales.data(), zeros.data(), nullptr}, 0, stats, executor);
    return;
  }
  for (std::size_t i = 0; i < groups; ++i) {
    std::memcpy(stats + 2 * i * item, scales.data() + i * item, item);
    std::memcpy(stats + (2 * i + 1) * item, zeros.data() + i * item, item);
  }
}

Groups groups_of(const PackedSpec& spec, WeightRun weights) {
  return {spec, weights, quantize_kernels(), grouping_of(spec),
          static_cast<float>((1 << spec.bits) - 1)};
}

}  // namespace

Grouping grouping_of(const PackedSpec& spec) {
  const std::int64_t groups = spec.rows * spec.cols / spec.group_size;
  if (spec.group_map == GroupMap::kColumnRuns) return {spec.group_size, groups, groups};
  return {groups, spec.group_size, groups};
}

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  const auto refuse = [](const std::string& text) { fail(Errc::kConfig, "hqq: " + text); };
  if (options.method != QuantizationMethod::HQQ) {
    refuse("method is " + std::string(method_name(options.method)) + ", expected hqq");
  }
  if (options.bits != 4 && options.bits != 8) {
    refuse("bits is " + std::to_string(options.bits) + ", expected one of 4, 8");
  }
  if (options.axis != 0 && options.axis != 1) {
    refuse("axis is " + std::to_string(options.axis) + ", expected one of 0, 1");
  }
  if (!is_weight_dtype(options.value_dtype)) {
    refuse("value_dtype is " + std::string(dtype_name(options.value_dtype)) +
           ", expected one of f32, f16, bf16");
  }
  const std::int64_t numel = checked_mul(rows, cols, "hqq: elements");
  const std::int64_t whole = options.axis == 1 ? cols : rows;
  const std::int64_t group = options.group_size == 0 ? whole : options.group_size;
  if (group < 1 || (options.group_size != 0 && group % kGroupMultiple != 0) || numel % group != 0) {
    refuse("group_size is " + std::to_string(options.group_size) +
           ", expected a multiple of 8 that divides the " + std::to_string(numel) +
           " weights, or 0 for one group per " + (options.axis == 1 ? "row" : "column"));
  }
  PackedSpec spec;
  spec.rows = rows;
  spec.cols = cols;
  spec.bits = options.bits;
  spec.offset = Offset::kZeroPoint;
  spec.scale = scale_source_of(options.value_dtype);
  spec.value_dtype = options.value_dtype;
  spec.group_map = options.axis == 1 ? GroupMap::kRowRuns : GroupMap::kColumnRuns;
  spec.group_size = group;
  spec.dialect = kDialectId;
  spec.dialect_flags = Flags{.optimize = options.optimize,
                             .round_zero = options.round_zero.value_or(options.bits == 4)}
                           .to_int();
  validate_spec(spec);
  if (spec.bits == 4 && grouping_of(spec).rows % 2 != 0) {
    fail(Errc::kShape,
         "hqq: rows of the grouped matrix are " + std::to_string(grouping_of(spec).rows) +
             ", expected an even number at 4 bits (group_size " + std::to_string(group) +
             ", shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "])");
  }
  return spec;
}

GroupParameters solve(const PackedSpec& spec, WeightRun weights, const Executor& executor) {
  const Groups g = groups_of(spec, weights);
  const Flags flags = Flags::from_int(spec.dialect_flags);
  GroupParameters p;
  p.scale.resize(static_cast<std::size_t>(g.grouping.groups));
  p.zero.resize(p.scale.size());

  constexpr std::int64_t kGrain = 1;
  std::atomic<bool> finite{true};
  executor.parallel_for(0, g.chunks(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c) {
      if (!initialize_chunk(g, c, flags.round_zero, p))
        finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!finite) refuse_not_finite("hqq", weights, spec.rows, spec.cols);
  if (!flags.optimize) return p;

  std::vector<double> errors(static_cast<std::size_t>(g.chunks()));
  float best = std::numeric_limits<float>::infinity();
  for (int round = 0; round < kSolverRounds; ++round) {
    executor.parallel_for(0, g.chunks(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        errors[static_cast<std::size_t>(c)] = step_chunk(g, c, p);
      }
    });
    double sum = 0;
    for (const double e : errors) sum += e;
    const auto error = static_cast<float>(sum / static_cast<double>(spec.rows * spec.cols));
    p.errors.push_back(error);
    if (!(error < best)) break;  // the zeros of this round are kept
    best = error;
  }
  return p;
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* /*shared*/, const Executor& executor) {
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "hqq: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const PackedLayout layout = layout_of(spec);
  const WeightRun run{dtype, weights};
  const GroupParameters p = solve(spec, run, executor);
  const Groups g = groups_of(spec, run);
  executor.parallel_for(
      0, spec.rows, rows_per_task(spec.cols), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
        for (std::int64_t r = begin; r < end; ++r) {
          encode_row(g, p, r, row.data());
          pack_row(spec.bits, row.data(), spec.cols, codes + r * layout.code_bytes);
        }
      });
  write_stats(g, p, stats, executor);
}

}  // namespace quantal::hqq

#include "formats/hqq/hqq_codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "formats/hqq/hqq_meta.h"
#include "formats/hqq/hqq_packing.h"
#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

/// Groups that one task handles.
constexpr std::int64_t kRunsPerChunk = 256;
/// The same where a group is a few numbers.
constexpr std::int64_t kGroupsPerTask = 8192;

/// A matrix of weights seen as groups.
struct Groups {
  const PackedSpec& spec;
  WeightRun weights;
  const QuantizeKernels& kernels;
  Grouping grouping;
  float max_code;
  // Column j of chunk c begins at element c * chunk_step + j of `column_weights`.
  WeightRun column_weights;
  std::int64_t chunk_step = kColumnBlock, stride = 0;

  WeightRun chunk_columns(std::int64_t chunk) const {
    return column_weights.at(chunk * chunk_step);
  }
  bool columns() const { return spec.group_map == GroupMap::kColumnRuns; }
  std::int64_t per_chunk() const { return columns() ? kColumnBlock : kRunsPerChunk; }
  std::int64_t chunks() const { return ceil_div(grouping.groups, per_chunk()); }
  std::int64_t end_of(std::int64_t chunk) const {
    return std::min(grouping.groups, (chunk + 1) * per_chunk());
  }
};

/// Copies each chunk of columns into a matrix of its own, once, because the solver comes back to it
/// in every round: in place its rows lie a large power of two apart and evict each other from the
/// caches. `tiles` owns the copy.
void gather_columns(Groups& g, FreshVector<std::uint8_t>& tiles, const Executor& executor) {
  const std::int64_t rows = g.grouping.rows, cols = g.grouping.cols;
  const auto item = static_cast<std::int64_t>(dtype_size(g.weights.dtype));
  const std::int64_t tile = checked_mul(rows, kColumnBlock, "hqq: tile");
  tiles.resize(static_cast<std::size_t>(
      checked_mul(checked_mul(g.chunks(), tile, "hqq: tiles"), item, "hqq: bytes of tiles")));
  executor.parallel_for(0, g.chunks(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c) {
      const std::int64_t first = c * kColumnBlock, count = g.end_of(c) - first;
      const auto* from = static_cast<const std::uint8_t*>(g.weights.at(first).data);
      std::uint8_t* to = tiles.data() + c * tile * item;
      for (std::int64_t i = 0; i < rows; ++i) {
        std::memcpy(to + i * kColumnBlock * item, from + i * cols * item,
                    static_cast<std::size_t>(count * item));
      }
    }
  });
  g.column_weights = {g.weights.dtype, tiles.data()};
  g.chunk_step = tile;
  g.stride = kColumnBlock;
}

/// Returns false if a weight of the chunk is not finite.
bool initialize_chunk(const Groups& g, std::int64_t chunk, bool round_zero, GroupParameters& p) {
  const std::int64_t begin = chunk * g.per_chunk(), end = g.end_of(chunk);
  bool finite = true;
  const auto set = [&](std::size_t k, float lowest, float highest) {
    const InitialCode code = initial_code(lowest, highest, g.max_code, round_zero);
    p.scale[k] = code.scale;
    p.zero[k] = code.zero;
  };
  std::array<float, kColumnBlock> low, high;
  if (g.columns()) {
    finite = g.kernels.range_columns(g.chunk_columns(chunk), g.grouping.rows, g.stride, end - begin,
                                     low.data(), high.data());
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const auto k = static_cast<std::size_t>(i), j = static_cast<std::size_t>(i - begin);
    if (g.columns()) {
      set(k, low[j], high[j]);
      continue;
    }
    const Range r = g.kernels.range(g.weights.at(i * g.spec.group_size), g.spec.group_size);
    finite = finite && r.finite;
    set(k, r.low, r.high);
  }
  return finite;
}

/// One round over the groups of a chunk: replaces their zeros and sets their residuals.
void step_chunk(const Groups& g, std::int64_t chunk, GroupParameters& p, double* residuals) {
  const std::int64_t begin = chunk * g.per_chunk(), end = g.end_of(chunk);
  const auto size = static_cast<double>(g.spec.group_size);
  if (g.columns()) {
    std::array<SolverSums, kColumnBlock> sums;
    g.kernels.solver_step_columns(g.chunk_columns(chunk), g.grouping.rows, g.stride, end - begin,
                                  p.scale.data() + begin, p.zero.data() + begin, g.max_code,
                                  sums.data());
    for (std::int64_t i = begin; i < end; ++i) {
      const SolverSums& s = sums[static_cast<std::size_t>(i - begin)];
      p.zero[static_cast<std::size_t>(i)] = static_cast<float>(s.zero / size);
      residuals[i] = s.error;
    }
    return;
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const auto k = static_cast<std::size_t>(i);
    const SolverSums s =
        g.kernels.solver_step(g.weights.at(i * g.spec.group_size), g.spec.group_size,
                              {p.scale[k], p.zero[k], g.max_code});
    p.zero[k] = static_cast<float>(s.zero / size);
    residuals[k] = s.error;
  }
}

/// Mean residual of the matrix that these rows are a part of.
float mean_residual(const Groups& g, std::span<const double> residuals, const RowGather& gather,
                    const Executor& executor) {
  const std::int64_t step = g.columns() ? 1 : g.spec.group_size;  // between first elements
  std::vector<double> rows = sums_by_row(residuals, step, g.spec.rows, g.spec.cols, executor);
  if (gather) rows = gather(std::move(rows));
  double sum = 0;
  for (const double row : rows) sum += row;
  return static_cast<float>(sum / static_cast<double>(std::ssize(rows) * g.spec.cols));
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

/// Residue of quantized parameters before they are filled, in the order of the file's fields.
struct MetaFields {
  std::vector<NamedTensor> scale, zero;
};
MetaFields blank_fields(const PackedSpec& spec) {
  const Flags flags = Flags::from_int(spec.dialect_flags);
  MetaFields out;
  if (flags.quant_scale) out.scale = blank_meta("scale", spec, kScaleMetaGroup);
  if (flags.quant_zero) out.zero = blank_meta("zero", spec, kZeroMetaGroup);
  return out;
}
std::vector<std::uint8_t> encode_fields(MetaFields fields) {
  std::vector<NamedTensor> all = std::move(fields.scale);
  for (NamedTensor& field : fields.zero) all.push_back(std::move(field));
  return encode_residue(all);
}

/// Stores 1 / scale and zero, both rounded to value_dtype, quantized before where asked for.
void write_stats(const Groups& g, GroupParameters p, std::uint8_t* stats, std::uint8_t* shared,
                 const Executor& executor) {
  const PackedSpec& spec = g.spec;
  const std::size_t item = dtype_size(spec.value_dtype);
  const auto groups = std::ssize(p.scale);
  const auto invert = [&p](std::int64_t begin, std::int64_t end) {
    std::for_each(p.scale.begin() + begin, p.scale.begin() + end,
                  [](float& scale) { scale = 1.0F / scale; });
  };
  MetaFields fields = blank_fields(spec);
  const bool scales_quantized = !fields.scale.empty();
  if (scales_quantized) {
    invert(0, groups);
    quantize_parameters("scale", spec, kScaleMetaGroup, p.scale, fields.scale);
  }
  if (!fields.zero.empty()) {
    quantize_parameters("zero", spec, kZeroMetaGroup, p.zero, fields.zero);
  }
  const std::vector<std::uint8_t> residue = encode_fields(std::move(fields));
  if (!residue.empty()) std::memcpy(shared, residue.data(), residue.size());

  const auto bytes = static_cast<std::size_t>(groups) * item;
  FreshVector<std::uint8_t> scales(bytes), zeros(bytes);
  executor.parallel_for(0, groups, kGroupsPerTask, [&](std::int64_t begin, std::int64_t end) {
    if (!scales_quantized) invert(begin, end);
    const auto at = static_cast<std::size_t>(begin) * item;
    narrow_from_f32(spec.value_dtype, p.scale.data() + begin, end - begin, scales.data() + at);
    narrow_from_f32(spec.value_dtype, p.zero.data() + begin, end - begin, zeros.data() + at);
  });
  write_parameters(spec, {{scales}, {zeros}}, {0, layout_of(spec).stat_rows}, stats, executor);
}

Groups groups_of(const PackedSpec& spec, WeightRun weights) {
  const Grouping grouping = grouping_of(spec);
  return {.spec = spec,
          .weights = weights,
          .kernels = quantize_kernels(),
          .grouping = grouping,
          .max_code = max_code_of(spec),
          .column_weights = weights,
          .stride = grouping.cols};
}

[[noreturn]] void refuse_option(const std::string& text) { fail(Errc::kConfig, "hqq: " + text); }

void check_options(const QuantizeOptions& options) {
  if (options.method != QuantizationMethod::HQQ) {
    refuse_option("method is " + std::string(method_name(options.method)) + ", expected hqq");
  }
  if (std::find(kBits.begin(), kBits.end(), options.bits) == kBits.end()) {
    refuse_option("bits is " + std::to_string(options.bits) +
                  ", expected one of 1, 2, 3, 4, 5, 6, 8");
  }
  if (!options.mode.empty() && (options.mode != kTernaryMode || options.bits != 2)) {
    refuse_option("mode is '" + options.mode + "' with bits " + std::to_string(options.bits) +
                  ", expected none, or '1.58' with bits 2");
  }
  if (options.axis != 0 && options.axis != 1) {
    refuse_option("axis is " + std::to_string(options.axis) + ", expected one of 0, 1");
  }
  if (!is_weight_dtype(options.value_dtype)) {
    refuse_option("value_dtype is " + std::string(dtype_name(options.value_dtype)) +
                  ", expected one of f32, f16, bf16");
  }
}

}  // namespace

InitialCode initial_code(float low, float high, float max_code, bool round_zero) {
  const float range = high - low;
  float scale = (1.0F / range) * max_code;
  if (std::fabs(range) <= kTinyRange) scale = 1.0F;
  scale = std::min(scale, kMaxInverseScale);
  const float zero = -low * scale;
  return {scale, round_zero ? std::nearbyint(zero) : zero};
}

PackedSpec make_spec(std::int64_t rows, std::int64_t cols, const QuantizeOptions& options) {
  check_options(options);
  const std::int64_t numel = checked_mul(rows, cols, "hqq: elements");
  const std::int64_t whole = options.axis == 1 ? cols : rows;
  const std::int64_t group = options.group_size == 0 ? whole : options.group_size;
  if (group < 1 || (options.group_size != 0 && group % kGroupMultiple != 0) || numel % group != 0) {
    refuse_option("group_size is " + std::to_string(options.group_size) +
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
                             .round_zero = options.round_zero.value_or(options.bits == 4),
                             .quant_zero = options.quant_zero.value_or(false),
                             .quant_scale = options.quant_scale.value_or(false),
                             .ternary = options.mode == kTernaryMode}
                           .to_int();
  validate_spec(spec);
  packing_of(spec.bits, grouping_of(spec),
             "hqq: group_size " + std::to_string(group) + " of shape [" + std::to_string(rows) +
                 ", " + std::to_string(cols) + "]");
  spec.residue_bytes = static_cast<std::int64_t>(encode_fields(blank_fields(spec)).size());
  return spec;
}

GroupParameters solve(const PackedSpec& spec, WeightRun weights, const Executor& executor,
                      const RowGather& gather) {
  Groups g = groups_of(spec, weights);
  const Flags flags = Flags::from_int(spec.dialect_flags);
  FreshVector<std::uint8_t> tiles;
  if (flags.optimize && g.columns() && g.chunks() > 1) gather_columns(g, tiles, executor);
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

  FreshVector<double> residuals(p.scale.size());
  float best = std::numeric_limits<float>::infinity();
  for (int round = 0; round < kSolverRounds; ++round) {
    executor.parallel_for(0, g.chunks(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        step_chunk(g, c, p, residuals.data());
      }
    });
    const float error = mean_residual(g, residuals, gather, executor);
    p.errors.push_back(error);
    if (!(error < best)) break;  // the zeros of this round are kept
    best = error;
  }
  return p;
}

void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* shared, const RowGather& gather,
                   const Executor& executor) {
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "hqq: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const PackedLayout layout = layout_of(spec);
  const WeightRun run{dtype, weights};
  GroupParameters p = solve(spec, run, executor, gather);
  const Groups g = groups_of(spec, run);
  executor.parallel_for(
      0, spec.rows, rows_per_task(spec.cols), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
        for (std::int64_t r = begin; r < end; ++r) {
          encode_row(g, p, r, row.data());
          pack_row(spec.bits, row.data(), spec.cols, codes + r * layout.code_bytes);
        }
      });
  write_stats(g, std::move(p), stats, shared, executor);
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor) {
  quantize_part(spec, dtype, weights, codes, stats, shared, {}, executor);
}

}  // namespace quantal::hqq

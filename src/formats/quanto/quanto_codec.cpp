#include "formats/quanto/quanto_codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "core/half.h"
#include "formats/tensors.h"
#include "kernels/rounded.h"

namespace quantal::quanto {
namespace {

float round_to(DType dtype, float x) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(x));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(x));
  return x;
}

/// A matrix of weights, already of the value dtype, seen as groups.
struct Groups {
  const PackedSpec& spec;
  WeightRun weights;
  Flags flags;
  const QuantizeKernels& kernels;
  const RoundedKernels& rounded;

  bool columns() const { return spec.group_map == GroupMap::kColumnBlocks; }
  bool symmetric() const { return spec.offset == Offset::kNone; }
  float max_code() const { return static_cast<float>((1 << spec.bits) - 1); }
  std::int64_t groups() const { return spec.rows * spec.cols / spec.group_size; }
  std::int64_t groups_per_row() const { return spec.cols / spec.group_size; }
  float round(float x) const { return round_to(spec.value_dtype, x); }
};

Groups groups_of(const PackedSpec& spec, WeightRun weights) {
  return {spec, weights, Flags::from_int(spec.dialect_flags), quantize_kernels(),
          rounded_kernels()};
}

/// Scale and shift of the max optimizer, or the absmax scale of a symmetric group; zero as it is
/// without a rounded shift.
void initialize_group(const Groups& g, float low, float high, std::size_t k, GroupParameters& p) {
  p.zero[k] = g.symmetric() ? static_cast<float>(kInt8Centre) : 0.0F;
  if (g.symmetric()) {
    constexpr float kLargest = 127.0F;
    p.scale[k] = g.round(std::max(std::fabs(low), std::fabs(high)) / kLargest);
    p.shift[k] = 0.0F;
    return;
  }
  p.scale[k] = g.round(g.round(high - low) / g.max_code());
  p.shift[k] = -low;
}

/// Replaces the shift in weight units by a rounded one in codes.
void round_shift(const Groups& g, std::size_t k, GroupParameters& p) {
  const float x = g.round(p.shift[k] / p.scale[k]);
  p.zero[k] = std::isnan(x) ? 0.0F : std::nearbyint(std::clamp(x, 0.0F, g.max_code()));
  p.shift[k] = 0.0F;
}

/// Parameters of one row's groups; false if a weight is not finite.
bool initialize_row(const Groups& g, std::int64_t row, GroupParameters& p) {
  bool finite = true;
  for (std::int64_t i = 0; i < g.groups_per_row(); ++i) {
    const std::int64_t group = row * g.groups_per_row() + i;
    const WeightRun run = g.weights.at(group * g.spec.group_size);
    if (g.symmetric()) {
      const float most = g.kernels.absmax(run, g.spec.group_size);
      finite = finite && std::isfinite(most);
      initialize_group(g, most, most, static_cast<std::size_t>(group), p);
      continue;
    }
    const Range r = g.kernels.range(run, g.spec.group_size);
    finite = finite && r.finite;
    initialize_group(g, r.low, r.high, static_cast<std::size_t>(group), p);
  }
  return finite;
}

/// Parameters of columns [begin, begin + count) of row block `block`.
bool initialize_columns(const Groups& g, std::int64_t block, std::int64_t begin, std::int64_t count,
                        GroupParameters& p) {
  const auto n = static_cast<std::size_t>(count);
  std::vector<float> low(n, std::numeric_limits<float>::infinity());
  std::vector<float> high(n, -std::numeric_limits<float>::infinity());
  bool finite = true;
  for (std::int64_t r = block * g.spec.group_size; r < (block + 1) * g.spec.group_size; ++r) {
    const WeightRun run = g.weights.at(r * g.spec.cols + begin);
    finite = g.rounded.range_each(run, count, low.data(), high.data()) && finite;
  }
  for (std::size_t j = 0; j < n; ++j) {
    initialize_group(g, low[j], high[j], static_cast<std::size_t>(block * g.spec.cols + begin) + j,
                     p);
  }
  return finite;
}

/// Calls body(block, first column, count) for pieces of the column groups.
template <class Body>
void for_each_columns(const Groups& g, const Executor& executor, Body body) {
  const std::int64_t chunks = ceil_div(g.spec.cols, kColumnChunk);
  const std::int64_t tasks = g.spec.rows / g.spec.group_size * chunks;
  executor.parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first = t % chunks * kColumnChunk;
      body(t, t / chunks, first, std::min(kColumnChunk, g.spec.cols - first));
    }
  });
}

/// Calls body(begin, end) for ranges of the groups, for work of a few operations each.
template <class Body>
void for_each_range(const Groups& g, const Executor& executor, const Body& body) {
  constexpr std::int64_t kGroupsPerTask = 8192;
  executor.parallel_for(0, g.groups(), kGroupsPerTask, body);
}

/// Codes of row `r`, one per byte.
void encode_row(const Groups& g, const GroupParameters& p, std::int64_t r, std::uint8_t* row) {
  const float max_code = g.symmetric() ? 255.0F : g.max_code();
  const float nan = g.flags.zero_point ? std::numeric_limits<float>::lowest() : 0.0F;
  if (g.columns()) {
    const std::int64_t first = r / g.spec.group_size * g.spec.cols;
    g.rounded.encode_each(
        g.weights.at(r * g.spec.cols), g.spec.cols,
        {p.scale.data() + first, p.shift.data() + first, p.zero.data() + first, max_code, nan},
        row);
    return;
  }
  for (std::int64_t i = 0; i < g.groups_per_row(); ++i) {
    const auto k = static_cast<std::size_t>(r * g.groups_per_row() + i);
    const std::int64_t at = i * g.spec.group_size;
    g.rounded.encode(g.weights.at(r * g.spec.cols + at), g.spec.group_size,
                     {p.scale[k], p.shift[k], p.zero[k], max_code, nan}, row + at);
  }
}

/// Scales and offsets in their storage type, into the packed statistics.
void write_stats(const Groups& g, const GroupParameters& p, std::uint8_t* stats,
                 const Executor& executor) {
  const std::size_t item = dtype_size(g.spec.value_dtype), groups = p.scale.size();
  const FreshVector<float>& offsets = g.flags.zero_point ? p.zero : p.shift;
  FreshVector<std::uint8_t> scale(groups * item), offset(g.symmetric() ? 0 : groups * item);
  for_each_range(g, executor, [&](std::int64_t begin, std::int64_t end) {
    const auto at = static_cast<std::size_t>(begin) * item;
    const DType dtype = g.spec.value_dtype;
    narrow_from_f32(dtype, p.scale.data() + begin, end - begin, scale.data() + at);
    if (offset.empty()) return;
    narrow_from_f32(dtype, offsets.data() + begin, end - begin, offset.data() + at);
  });
  if (!g.columns()) {
    spread_stats(g.spec,
                 {.scales = scale.data(), .offsets = offset.empty() ? nullptr : offset.data()}, 0,
                 stats, executor);
    return;
  }
  if (offset.empty()) {
    std::ranges::copy(scale, stats);
  } else {
    interleave(item, g.groups(), scale.data(), offset.data(), stats, executor);
  }
}

/// Residuals of one solver step by row (axis -1: of a row block at its first row); the terms of
/// each group go to `sums`.
std::vector<double> step(const Groups& g, const GroupParameters& p, const Shrink& shrink,
                         FreshVector<double>& sums, const Executor& executor) {
  std::vector<double> rows(static_cast<std::size_t>(g.spec.rows));
  const float max_code = g.max_code();
  if (g.columns()) {
    const std::int64_t chunks = ceil_div(g.spec.cols, kColumnChunk);
    std::vector<double> errors(static_cast<std::size_t>(g.spec.rows / g.spec.group_size * chunks));
    for_each_columns(
        g, executor,
        [&](std::int64_t task, std::int64_t block, std::int64_t first, std::int64_t count) {
          std::vector<double> error(static_cast<std::size_t>(count));
          const std::int64_t at = block * g.spec.cols + first;
          std::fill_n(sums.data() + at, count, 0.0);
          const RoundedCodes codes = {p.scale.data() + at, p.shift.data() + at, p.zero.data() + at,
                                      max_code, 0.0F};
          for (std::int64_t r = block * g.spec.group_size; r < (block + 1) * g.spec.group_size;
               ++r) {
            g.rounded.shrink_step_each(g.weights.at(r * g.spec.cols + first), count, codes, shrink,
                                       sums.data() + at, error.data());
          }
          for (const double e : error) errors[static_cast<std::size_t>(task)] += e;
        });
    for (std::size_t task = 0; task < errors.size(); ++task) {
      const std::int64_t block = static_cast<std::int64_t>(task) / chunks;
      rows[static_cast<std::size_t>(block * g.spec.group_size)] += errors[task];
    }
  } else {
    executor.parallel_for(
        0, g.spec.rows, rows_per_task(g.spec.cols), [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r) {
            for (std::int64_t i = 0; i < g.groups_per_row(); ++i) {
              const auto k = static_cast<std::size_t>(r * g.groups_per_row() + i);
              const SolverSums s = g.rounded.shrink_step(
                  g.weights.at(static_cast<std::int64_t>(k) * g.spec.group_size), g.spec.group_size,
                  {p.scale[k], p.shift[k], 0.0F, max_code, 0.0F}, shrink);
              sums[k] = s.zero;
              rows[static_cast<std::size_t>(r)] += s.error;
            }
          }
        });
  }
  return rows;
}

/// Largest scale of each row's groups; with axis -1 of a row block, at its first row.
std::vector<double> largest_scales(const Groups& g, const GroupParameters& p) {
  std::vector<double> rows(static_cast<std::size_t>(g.spec.rows));
  const std::int64_t per_unit = g.columns() ? g.spec.cols : g.groups_per_row();
  for (std::int64_t unit = 0; per_unit * unit < g.groups(); ++unit) {
    const std::span<const float> scales(p.scale.data() + per_unit * unit,
                                        static_cast<std::size_t>(per_unit));
    double& top = rows[static_cast<std::size_t>(g.columns() ? unit * g.spec.group_size : unit)];
    for (const float scale : scales) top = std::max(top, static_cast<double>(scale));
  }
  return rows;
}

/// Weights rounded to the value dtype, where they have another.
std::vector<std::uint8_t> converted(const PackedSpec& spec, WeightRun weights,
                                    const Executor& executor) {
  const auto item = static_cast<std::int64_t>(dtype_size(spec.value_dtype));
  std::vector<std::uint8_t> out(static_cast<std::size_t>(spec.rows * spec.cols * item));
  executor.parallel_for(
      0, spec.rows, rows_per_task(spec.cols), [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> row(static_cast<std::size_t>(spec.cols));
        for (std::int64_t r = begin; r < end; ++r) {
          widen_to_f32(weights.dtype, weights.at(r * spec.cols).data, spec.cols, row.data());
          narrow_from_f32(spec.value_dtype, row.data(), spec.cols,
                          out.data() + r * spec.cols * item);
        }
      });
  return out;
}

/// Fills scale and shift of every group; with `codes`, encodes each row right after its groups.
/// Returns false if a weight is not finite.
bool initialize(const Groups& g, GroupParameters& p, const Executor& executor,
                const std::function<void(std::int64_t)>& then) {
  std::atomic<bool> finite{true};
  if (g.columns()) {
    for_each_columns(g, executor,
                     [&](std::int64_t, std::int64_t block, std::int64_t first, std::int64_t count) {
                       if (!initialize_columns(g, block, first, count, p)) finite = false;
                     });
    return finite;
  }
  executor.parallel_for(0, g.spec.rows, rows_per_task(g.spec.cols),
                        [&](std::int64_t begin, std::int64_t end) {
                          for (std::int64_t r = begin; r < end; ++r) {
                            if (!initialize_row(g, r, p)) finite = false;
                            if (then && finite) then(r);
                          }
                        });
  return finite;
}

}  // namespace

Shrink shrink_of(int round, DType value_dtype) {
  constexpr double kFirstBeta = 10, kKappa = 1.01, kNorm = 0.7;
  double beta = kFirstBeta;
  for (int i = 0; i < round; ++i) beta *= kKappa;
  // Below this |d| - |d|^power / beta is negative by more than two roundings.
  constexpr double kMargin = 0.97;
  return {.inverse_beta = static_cast<float>(1.0 / beta),
          .power = round_to(value_dtype, static_cast<float>(kNorm - 1)),
          .no_shrink = static_cast<float>(std::pow(kMargin / beta, 1.0 / (2.0 - kNorm)))};
}

void optimize_shifts(const PackedSpec& spec, WeightRun weights, GroupParameters& p,
                     const Executor& executor, const RowGather& gather) {
  const Groups g = groups_of(spec, weights);
  const auto size = static_cast<double>(spec.group_size);
  FreshVector<double> sums(p.scale.size());
  FreshVector<float> best(p.shift.size());
  for (int round = 0; round <= kSolverRounds; ++round) {
    std::vector<double> rows = step(g, p, shrink_of(round, spec.value_dtype), sums, executor);
    if (gather) rows = gather(std::move(rows));
    double error = 0;
    for (const double row : rows) error += row;
    const auto numel = static_cast<double>(std::ssize(rows) * spec.cols);
    p.errors.push_back(g.round(static_cast<float>(error / numel)));
    const std::size_t last = p.errors.size() - 1;
    if (last > 0 && !(p.errors[last] < p.errors[last - 1])) break;
    best.swap(p.shift);
    for_each_range(g, executor, [&](std::int64_t begin, std::int64_t end) {
      for (auto k = static_cast<std::size_t>(begin); k < static_cast<std::size_t>(end); ++k) {
        p.shift[k] = g.round(static_cast<float>(sums[k] / size));
      }
    });
  }
  p.shift = std::move(best);
}

void quantize_part(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
                   std::uint8_t* stats, std::uint8_t* /*shared*/, const RowGather& gather,
                   const Executor& executor) {
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "quanto: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const PackedLayout layout = layout_of(spec);
  const WeightRun original{dtype, weights};
  std::vector<std::uint8_t> copy;
  if (dtype != spec.value_dtype) copy = converted(spec, original, executor);
  const WeightRun run{spec.value_dtype, copy.empty() ? weights : copy.data()};
  const Groups g = groups_of(spec, run);
  GroupParameters p;
  const auto groups = static_cast<std::size_t>(g.groups());
  p.scale.resize(groups);
  p.shift.resize(groups);
  p.zero.resize(groups);

  const auto encode = [&](std::int64_t r) {
    thread_local std::vector<std::uint8_t> row;
    row.resize(static_cast<std::size_t>(spec.cols));
    encode_row(g, p, r, row.data());
    pack_row(spec.bits, row.data(), spec.cols, codes + r * layout.code_bytes);
  };
  const bool at_once =
      !g.columns() && !g.flags.optimize && !g.flags.zero_point && !g.flags.per_tensor;
  if (!initialize(g, p, executor, at_once ? encode : std::function<void(std::int64_t)>{})) {
    refuse_not_finite("quanto", run, spec.rows, spec.cols);
  }
  if (g.flags.optimize) optimize_shifts(spec, run, p, executor, gather);
  if (g.flags.per_tensor) {
    std::vector<double> rows = largest_scales(g, p);
    if (gather) rows = gather(std::move(rows));
    const auto top = static_cast<float>(*std::max_element(rows.begin(), rows.end()));
    std::fill(p.scale.begin(), p.scale.end(), top);
  }
  if (g.flags.zero_point) {
    for_each_range(g, executor, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) round_shift(g, static_cast<std::size_t>(k), p);
    });
  }
  if (!at_once) {
    executor.parallel_for(0, spec.rows, rows_per_task(spec.cols),
                          [&](std::int64_t begin, std::int64_t end) {
                            for (std::int64_t r = begin; r < end; ++r) encode(r);
                          });
  }
  write_stats(g, p, stats, executor);
}

void quantize(const PackedSpec& spec, DType dtype, const void* weights, std::uint8_t* codes,
              std::uint8_t* stats, std::uint8_t* shared, const Executor& executor) {
  quantize_part(spec, dtype, weights, codes, stats, shared, {}, executor);
}

}  // namespace quantal::quanto

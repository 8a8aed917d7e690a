// A part of a matrix is quantized as a matrix of its own, taken larger until every group and
// second-level block in it is whole; what needs all rows comes from the ranks by row.
#include "quantal/shards.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

namespace quantal {
namespace {

/// Bytes of weights that are read at a time where rows stand alone.
constexpr std::int64_t kPanelBytes = 64 << 20;
/// Codes that are exchanged at a time.
constexpr std::int64_t kSliceBytes = 16 << 20;

/// How parts of a form are cut.
enum class Cut : std::uint8_t {
  kRows,      ///< rows stand alone, up to multiples of `step`
  kKeepStep,  ///< the same, but a value of all rows decides
  kColumns,   ///< groups of every (rows / group_size)-th row
  kWhole,     ///< each rank quantizes everything
};

struct Plan {
  Cut cut = Cut::kRows;
  std::int64_t step = 1;  ///< rows between common borders of groups and blocks
};

Plan plan_of(const PackedSpec& spec) {
  const Dialect& dialect = dialect_by_id(spec.dialect);
  if (spec.group_map == GroupMap::kColumnRuns) {
    return {spec.rows % spec.group_size == 0 && spec.residue_bytes == 0 ? Cut::kColumns
                                                                        : Cut::kWhole};
  }
  if (spec.residue_bytes != 0) return {Cut::kWhole};  // HQQ: statistics that are quantized together
  Plan plan;
  plan.cut = dialect.quantize_part != nullptr ? Cut::kKeepStep : Cut::kRows;
  if (spec.group_map == GroupMap::kColumnBlocks) {
    plan.step = spec.group_size;
    return plan;
  }
  std::int64_t unit = spec.group_size;
  if (spec.scale == ScaleSource::kNestedU8) {
    unit = checked_mul(unit, spec.nested_group_size, "quantize_rows: elements of a block");
  }
  plan.step = unit / std::gcd(unit, std::max<std::int64_t>(spec.cols, 1));
  return plan;
}

void check_part(const PackedSpec& whole, RowRange part) {
  if (part.begin >= 0 && part.begin <= part.end && part.end <= whole.rows) return;
  fail(Errc::kShape, "quantize_rows: part is rows [" + std::to_string(part.begin) + ", " +
                         std::to_string(part.end) + "), expected within [0, " +
                         std::to_string(whole.rows) + ")");
}

/// `part`, taken larger to borders. An empty part that has to keep step stands on the first rows.
RowRange widened(const PackedSpec& whole, const Plan& plan, RowRange part) {
  if (part.size() == 0) {
    if (plan.cut == Cut::kRows) return part;
    return {0, std::min(whole.rows, plan.step)};
  }
  const std::int64_t last = ceil_div(part.end, plan.step);
  return {part.begin / plan.step * plan.step,
          last > whole.rows / plan.step ? whole.rows : last * plan.step};
}

/// Groups of a part (kColumns), as rows of the first rows / group_size ones; never empty.
RowRange group_rows(const PackedSpec& whole, RowRange part) {
  const std::int64_t period = whole.rows / whole.group_size;
  // Equal shares in order of parts, so that parts that follow one another give such shares too.
  const auto share = [&](std::int64_t row) { return row / whole.group_size; };
  RowRange out{share(part.begin), part.end == whole.rows ? period : share(part.end)};
  return out;
}

std::vector<std::uint8_t> read_rows(const PackedSpec& whole, const RowSource& source,
                                    std::span<const RowRange> ranges) {
  const std::int64_t row_bytes = checked_mul(
      whole.cols, static_cast<std::int64_t>(dtype_size(source.dtype)), "quantize_rows: row");
  std::int64_t rows = 0;
  for (const RowRange& r : ranges) rows += r.size();
  std::vector<std::uint8_t> out(
      static_cast<std::size_t>(checked_mul(rows, row_bytes, "quantize_rows: bytes")));
  std::uint8_t* at = out.data();
  for (const RowRange& r : ranges) {
    if (r.size() == 0) continue;
    source.read(r, at);
    at += r.size() * row_bytes;
  }
  return out;
}

PackedSpec rows_of(PackedSpec spec, std::int64_t rows) {
  spec.rows = rows;
  return spec;
}

/// Rows of the whole matrix as one of their own.
struct HeldRows {
  std::vector<RowRange> ranges;
  RowGather gather;  ///< empty: no row depends on others
};

PackedMatrix quantize_held(const PackedSpec& whole, const HeldRows& held, const RowSource& source,
                           const Executor& executor) {
  const Dialect& dialect = dialect_by_id(whole.dialect);
  std::int64_t rows = 0;
  for (const RowRange& r : held.ranges) rows += r.size();
  const std::vector<std::uint8_t> weights = read_rows(whole, source, held.ranges);
  PackedMatrix out = make_packed(rows_of(whole, rows));
  try {
    if (held.gather && dialect.quantize_part != nullptr) {
      dialect.quantize_part(out.spec, source.dtype, weights.data(), out.codes.data(),
                            out.stats.data(), out.shared.data(), held.gather, executor);
    } else {
      dialect.quantize(out.spec, source.dtype, weights.data(), out.codes.data(), out.stats.data(),
                       out.shared.data(), executor);
    }
  } catch (const Error& e) {
    if (held.ranges.front().begin == 0 && held.ranges.size() == 1) throw;
    throw Error(e.code(),
                std::string(e.what()) + "; rows are counted from row " +
                    std::to_string(held.ranges.front().begin) +
                    (held.ranges.size() == 1 ? "" : ", in steps of groups"),
                e.site());
  }
  return out;
}

std::span<std::uint8_t> as_bytes(std::vector<double>& values) {
  return {reinterpret_cast<std::uint8_t*>(values.data()), values.size() * sizeof(double)};
}

/// Rows `mine` of the matrix at hand are rows [at, ...) of the whole; others are other ranks'.
RowGather gather_rows(const PackedSpec& whole, RowRange mine, std::int64_t at,
                      const Exchange& exchange) {
  return [&whole, mine, at, &exchange](std::vector<double> own) {
    std::vector<double> all(static_cast<std::size_t>(whole.rows));
    std::copy(own.begin() + mine.begin, own.begin() + mine.end, all.begin() + at);
    exchange(as_bytes(all));
    return all;
  };
}

/// Copies rows of `from` to the end of `to`.
void append(const std::vector<std::uint8_t>& from, RowRange rows, std::int64_t row_bytes,
            std::vector<std::uint8_t>& to) {
  to.insert(to.end(), from.begin() + rows.begin * row_bytes, from.begin() + rows.end * row_bytes);
}

/// Rows of `from`, which is given up.
std::vector<std::uint8_t> take(std::vector<std::uint8_t>&& from, RowRange rows,
                               std::int64_t row_bytes) {
  if (rows.begin == 0 && rows.size() * row_bytes == std::ssize(from)) return std::move(from);
  return {from.begin() + rows.begin * row_bytes, from.begin() + rows.end * row_bytes};
}

/// Rows that stand alone, a panel at a time.
void quantize_panels(const PackedSpec& whole, const Plan& plan, RowRange part,
                     const RowSource& source, const Executor& executor, PackedRows& out) {
  const PackedLayout layout = layout_of(whole);
  const std::int64_t row_bytes =
      std::max<std::int64_t>(1, whole.cols * static_cast<std::int64_t>(dtype_size(source.dtype)));
  const std::int64_t step = ceil_div(std::max<std::int64_t>(1, kPanelBytes / row_bytes), plan.step);
  out.codes.reserve(static_cast<std::size_t>(part.size() * layout.code_bytes));
  out.stats.reserve(static_cast<std::size_t>(part.size() * layout.stat_bytes));
  for (std::int64_t begin = part.begin; begin < part.end;) {
    const std::int64_t next = (begin / plan.step + step) * plan.step;
    const RowRange panel{begin, std::min(part.end, next)};
    const RowRange held = widened(whole, plan, panel);
    PackedMatrix matrix = quantize_held(whole, {{held}, {}}, source, executor);
    const RowRange mine{panel.begin - held.begin, panel.end - held.begin};
    append(matrix.codes, mine, layout.code_bytes, out.codes);
    append(matrix.stats, mine, layout.stat_bytes, out.stats);
    out.shared = std::move(matrix.shared);
    begin = panel.end;
  }
}

/// Rows that keep step, or share statistics in row blocks.
void quantize_in_step(const PackedSpec& whole, const Plan& plan, RowRange part,
                      const RowSource& source, const Exchange& exchange, const Executor& executor,
                      PackedRows& out) {
  const PackedLayout layout = layout_of(whole);
  const RowRange held = widened(whole, plan, part);
  const RowRange mine =
      part.size() == 0 ? RowRange{} : RowRange{part.begin - held.begin, part.end - held.begin};
  RowGather gather;
  if (plan.cut == Cut::kKeepStep) gather = gather_rows(whole, mine, part.begin, exchange);
  PackedMatrix matrix = quantize_held(whole, {{held}, gather}, source, executor);
  out.codes = take(std::move(matrix.codes), mine, layout.code_bytes);
  out.shared = std::move(matrix.shared);
  if (whole.group_map == GroupMap::kRowRuns) {
    out.stats = take(std::move(matrix.stats), mine, layout.stat_bytes);
    return;
  }
  // Row blocks belong to the part that has their first row.
  out.stats.resize(static_cast<std::size_t>(layout.stat_rows * layout.stat_bytes));
  const std::int64_t block_bytes = whole.cols * layout.stat_bytes;
  for (std::int64_t b = ceil_div(part.begin, plan.step); b < ceil_div(part.end, plan.step); ++b) {
    std::memcpy(out.stats.data() + b * block_bytes,
                matrix.stats.data() + (b - held.begin / plan.step) * block_bytes,
                static_cast<std::size_t>(block_bytes));
  }
  exchange(out.stats);
}

std::vector<RowRange> column_ranges(const PackedSpec& whole, RowRange groups) {
  const std::int64_t period = whole.rows / whole.group_size;
  std::vector<RowRange> out;
  for (std::int64_t k = 0; k < whole.group_size; ++k) {
    out.push_back({k * period + groups.begin, k * period + groups.end});
  }
  return out;
}

/// Sends codes of every (rows / group_size)-th row to the ranks that hold these rows, so many rows
/// at a time as kSliceBytes hold.
void exchange_codes(const PackedSpec& whole, RowRange part, RowRange mine,
                    const std::vector<std::uint8_t>& codes, const Exchange& exchange,
                    std::vector<std::uint8_t>& out) {
  const std::int64_t row_bytes = layout_of(whole).code_bytes;
  const std::int64_t period = whole.rows / whole.group_size;
  const std::int64_t step = std::clamp<std::int64_t>(
      kSliceBytes / std::max<std::int64_t>(1, period * row_bytes), 1, whole.group_size);
  out.resize(static_cast<std::size_t>(part.size() * row_bytes));
  std::vector<std::uint8_t> slice;
  for (std::int64_t first = 0; first < whole.group_size; first += step) {
    const std::int64_t count = std::min(step, whole.group_size - first);
    slice.assign(static_cast<std::size_t>(count * period * row_bytes), 0);
    for (std::int64_t k = first; k < first + count && mine.size() != 0; ++k) {
      std::memcpy(slice.data() + ((k - first) * period + mine.begin) * row_bytes,
                  codes.data() + k * mine.size() * row_bytes,
                  static_cast<std::size_t>(mine.size() * row_bytes));
    }
    exchange(slice);
    const std::int64_t begin = std::max(part.begin, first * period);
    const std::int64_t end = std::min(part.end, (first + count) * period);
    if (begin >= end) continue;
    std::memcpy(out.data() + (begin - part.begin) * row_bytes,
                slice.data() + (begin - first * period) * row_bytes,
                static_cast<std::size_t>((end - begin) * row_bytes));
  }
}

/// Groups that go through all rows: a rank quantizes whole groups, then codes go where they belong.
void quantize_columns(const PackedSpec& whole, RowRange part, const RowSource& source,
                      const Exchange& exchange, const Executor& executor, PackedRows& out) {
  const PackedLayout layout = layout_of(whole);
  const RowRange mine = group_rows(whole, part);
  const RowRange held = mine.size() == 0 ? RowRange{0, 1} : mine;
  const RowGather gather = gather_rows(whole, {0, mine.size()}, mine.begin, exchange);
  PackedMatrix matrix =
      quantize_held(whole, {column_ranges(whole, held), gather}, source, executor);
  out.shared = std::move(matrix.shared);
  out.stats.resize(static_cast<std::size_t>(layout.stat_rows * layout.stat_bytes));
  const std::int64_t stat_bytes = whole.cols * layout.stat_bytes;  // of one row of groups
  if (mine.size() != 0) {
    std::memcpy(out.stats.data() + mine.begin * stat_bytes, matrix.stats.data(),
                static_cast<std::size_t>(mine.size() * stat_bytes));
  }
  exchange(out.stats);
  exchange_codes(whole, part, mine, matrix.codes, exchange, out.codes);
}

void quantize_whole(const PackedSpec& whole, RowRange part, const RowSource& source,
                    const Executor& executor, PackedRows& out) {
  const PackedLayout layout = layout_of(whole);
  PackedMatrix matrix = quantize_held(whole, {{{0, whole.rows}}, {}}, source, executor);
  append(matrix.codes, part, layout.code_bytes, out.codes);
  if (whole.group_map == GroupMap::kRowRuns) {
    append(matrix.stats, part, layout.stat_bytes, out.stats);
  } else {
    out.stats = std::move(matrix.stats);
  }
  out.shared = std::move(matrix.shared);
}

}  // namespace

std::vector<RowRange> rows_to_read(const PackedSpec& whole, RowRange part) {
  check_part(whole, part);
  const Plan plan = plan_of(whole);
  if (plan.cut == Cut::kWhole) return {{0, whole.rows}};
  if (plan.cut == Cut::kColumns) {
    const RowRange groups = group_rows(whole, part);
    return column_ranges(whole, groups.size() == 0 ? RowRange{0, 1} : groups);
  }
  const RowRange held = widened(whole, plan, part);
  if (held.size() == 0) return {};
  return {held};
}

PackedRows quantize_rows(const PackedSpec& whole, RowRange part, const RowSource& source,
                         const Exchange& exchange, const Executor& executor) {
  validate_spec(whole);
  check_part(whole, part);
  if (!is_weight_dtype(source.dtype)) {
    fail(Errc::kDtype, "quantize_rows: weights have dtype " +
                           std::string(dtype_name(source.dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const Plan plan = plan_of(whole);
  PackedRows out;
  out.shared.resize(static_cast<std::size_t>(layout_of(whole).shared_bytes));
  if (whole.rows == 0) return out;
  switch (plan.cut) {
    case Cut::kWhole:
      quantize_whole(whole, part, source, executor, out);
      break;
    case Cut::kColumns:
      quantize_columns(whole, part, source, exchange, executor, out);
      break;
    case Cut::kKeepStep:
      quantize_in_step(whole, plan, part, source, exchange, executor, out);
      break;
    case Cut::kRows:
      if (whole.group_map == GroupMap::kRowRuns) {
        quantize_panels(whole, plan, part, source, executor, out);
      } else {
        quantize_in_step(whole, plan, part, source, exchange, executor, out);
      }
      break;
  }
  return out;
}

RowRange rank_rows(std::int64_t rows, std::int64_t rank, std::int64_t size) {
  const std::int64_t each = ceil_div(rows, std::max<std::int64_t>(size, 1));
  return {std::min(rows, rank * each), std::min(rows, (rank + 1) * each)};
}

}  // namespace quantal

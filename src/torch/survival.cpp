#include "torch/survival.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantal {
namespace {

/// Values that are decoded at a time.
constexpr std::int64_t kPanelValues = 1 << 20;

std::int64_t rows_at_a_time(const PackedSpec& spec) {
  return std::clamp<std::int64_t>(kPanelValues / std::max<std::int64_t>(spec.cols, 1), 1,
                                  std::max<std::int64_t>(spec.rows, 1));
}

void decode(const PackedView& w, std::int64_t begin, std::int64_t end, std::vector<float>& out,
            const Executor& executor) {
  dequantize(w, {begin, end, 0, w.spec.cols}, DType::kF32, out.data(), w.spec.cols, executor);
}

/// Sums over one row.
struct RowSums {
  std::int64_t changed = 0;
  double dd = 0, ed = 0, ee = 0;
};

std::int64_t changed_codes(const PackedView& a, const PackedView& b, std::int64_t row,
                           std::int64_t code_bytes, std::vector<std::uint8_t>& codes) {
  const auto cols = static_cast<std::size_t>(a.spec.cols);
  unpack_row(a.spec.bits, a.codes.data() + row * code_bytes, a.spec.cols, codes.data());
  unpack_row(b.spec.bits, b.codes.data() + row * code_bytes, b.spec.cols, codes.data() + cols);
  std::int64_t count = 0;
  for (std::size_t c = 0; c < cols; ++c) count += codes[c] != codes[cols + c] ? 1 : 0;
  return count;
}

RowSums sums_of(const float* before, const float* after, const float* target, std::int64_t cols) {
  RowSums sums;
  for (std::int64_t c = 0; c < cols; ++c) {
    const double d = static_cast<double>(target[c]) - static_cast<double>(before[c]);
    const double e = static_cast<double>(after[c]) - static_cast<double>(before[c]);
    sums.dd += d * d;
    sums.ed += e * d;
    sums.ee += e * e;
  }
  return sums;
}

Survival summary(const std::vector<RowSums>& rows) {
  RowSums total;
  for (const RowSums& row : rows) {
    total.changed += row.changed;
    total.dd += row.dd;
    total.ed += row.ed;
    total.ee += row.ee;
  }
  Survival out;
  out.codes_changed = total.changed;
  out.delta_norm = std::sqrt(total.dd);
  if (total.dd > 0) {
    out.surviving = total.ed / total.dd;
    // ||E - s D||^2 = <E, E> - s <E, D>; rounding may leave it just below zero.
    out.noise = std::sqrt(std::max(0.0, total.ee - out.surviving * total.ed) / total.dd);
  } else if (total.ee > 0) {
    out.noise = std::numeric_limits<double>::infinity();
  }
  return out;
}

}  // namespace

Survival measure_survival(const PackedView& before, const PackedView& after, const float* target,
                          const Executor& executor) {
  check_packed(before);
  check_packed(after);
  const PackedSpec& spec = before.spec;
  if (after.spec.rows != spec.rows || after.spec.cols != spec.cols ||
      after.spec.bits != spec.bits) {
    fail(Errc::kShape, "measure_survival: forms differ, expected two matrices of one spec");
  }
  const std::int64_t step = rows_at_a_time(spec), code_bytes = layout_of(spec).code_bytes;
  const auto values = static_cast<std::size_t>(step * spec.cols);
  std::vector<float> was(values), is(values);
  std::vector<RowSums> rows(static_cast<std::size_t>(spec.rows));
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t end = std::min(begin + step, spec.rows);
    decode(before, begin, end, was, executor);
    decode(after, begin, end, is, executor);
    executor.parallel_for(begin, end, 16, [&](std::int64_t from, std::int64_t to) {
      std::vector<std::uint8_t> codes(2 * static_cast<std::size_t>(spec.cols));
      for (std::int64_t r = from; r < to; ++r) {
        const std::int64_t at = (r - begin) * spec.cols;
        RowSums& row = rows[static_cast<std::size_t>(r)];
        row = sums_of(was.data() + at, is.data() + at, target + r * spec.cols, spec.cols);
        row.changed = changed_codes(before, after, r, code_bytes, codes);
      }
    });
  }
  return summary(rows);
}

std::vector<double> row_square_sums(const PackedView& w, const Executor& executor) {
  check_packed(w);
  const PackedSpec& spec = w.spec;
  const std::int64_t step = rows_at_a_time(spec);
  std::vector<float> values(static_cast<std::size_t>(step * spec.cols));
  std::vector<double> sums(static_cast<std::size_t>(spec.rows), 0.0);
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t end = std::min(begin + step, spec.rows);
    decode(w, begin, end, values, executor);
    executor.parallel_for(begin, end, 16, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t r = from; r < to; ++r) {
        const float* row = values.data() + (r - begin) * spec.cols;
        double sum = 0;
        for (std::int64_t c = 0; c < spec.cols; ++c) {
          sum += static_cast<double>(row[c]) * static_cast<double>(row[c]);
        }
        sums[static_cast<std::size_t>(r)] = sum;
      }
    });
  }
  return sums;
}

}  // namespace quantal

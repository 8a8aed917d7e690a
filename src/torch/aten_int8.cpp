// The product of LLM.int8 (quantal/kernels.h, matmul_int8) in operators of torch. Integers are held
// in float32 and multiplied in blocks of columns whose sums stay exact, so that without outliers
// the result has the bits of the CPU's. Whether a column has an outlier is not asked: a second
// product takes all columns, with zeros in place of the others.
#include <algorithm>
#include <cstdlib>

#include "kernels/llm_int8.h"
#include "torch/ops_aten.h"

namespace quantal::stable_ops {
namespace {

constexpr std::int64_t kExactFloats = 1 << 24;  // integers up to it are float32
constexpr std::int64_t kExactSums = std::int64_t{1} << 31;

/// Rows of activations in integers, and what they leave out.
struct RoundedRows {
  Tensor q;      // [m, cols] float32
  Tensor scale;  // [m, 1]
  Tensor rest;   // [m, cols]: values of x in columns with an outlier, else 0
};

RoundedRows rounded_rows(const Tensor& x, float threshold) {
  const auto number = [&](double v) { return aten::scalar(x, v, ScalarType::Float); };
  const Tensor zero = number(0), own = aten::cast(x, ScalarType::Float);
  const Tensor half = aten::cast(aten::cast(x, ScalarType::Half), ScalarType::Float);
  Tensor inlier = half, columns = half;
  if (threshold > 0.0F) {
    const Tensor outlier = aten::at_least(aten::magnitude(half), number(threshold));
    inlier = aten::choose(outlier, zero, half);
    columns = call("aten::any", "dim", outlier, std::int64_t{0}, true);
  }
  const Tensor most = aten::largest(aten::magnitude(inlier), 1);
  const Tensor scale = aten::add(most, aten::multiply(most, zero));  // NaN after an infinity
  const Tensor factor = aten::multiply(aten::divide(number(1), scale), number(kInt8Levels));
  const Tensor r = call("aten::round", "", aten::multiply(inlier, factor));
  Tensor q = aten::choose(aten::equal(r, r), r, zero);
  if (!(threshold > 0.0F)) return {q, scale, q};
  q = aten::choose(columns, zero, q);
  return {q, scale, aten::choose(columns, own, zero)};
}

/// x w^T, both float32.
Tensor product(const Tensor& x, const Tensor& w) {
  const Tensor out = empty_like_of(x, {x.size(0), w.size(0)}, ScalarType::Float);
  call("aten::linear", "out", x, w, std::optional<Tensor>(), out);
  return out;
}

/// The same for integers: exact, then rounded to float32. `block` columns have an exact sum.
Tensor exact_product(const Tensor& q, const Tensor& numbers, std::int64_t block) {
  const std::int64_t cols = q.size(1), blocks = ceil_div(cols, block);
  if (blocks == 1) return product(q, numbers);
  const Tensor parts = empty_like_of(q, {blocks, q.size(0), numbers.size(0)}, ScalarType::Float);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * block, count = std::min(block, cols - begin);
    const Tensor out = stable::select(parts, 0, b);
    call("aten::linear", "out", aten::narrow(q, 1, begin, count),
         aten::narrow(numbers, 1, begin, count), std::optional<Tensor>(), out);
  }
  const Tensor integers = aten::cast(parts, ScalarType::Int);
  return aten::cast(aten::sum(integers, 0, ScalarType::Int), ScalarType::Float);
}

}  // namespace

Tensor aten_int8_product(const AtenPacked& w, const Tensor& x, const std::optional<Tensor>& bias,
                         float threshold, std::int64_t most) {
  const PackedSpec& spec = w.spec();
  check_llm_int8(spec, threshold);
  const std::int64_t largest = std::max(std::abs(spec.centre), std::abs(255 - spec.centre));
  const std::int64_t term = static_cast<std::int64_t>(kInt8Levels) * largest;
  if (spec.cols > kExactSums / term) {
    fail(Errc::kUnsupported, "quantal::linear_int8: in_features is " + std::to_string(spec.cols) +
                                 ", expected at most " + std::to_string(kExactSums / term) +
                                 " on a device without kernels");
  }
  const ScalarType type = x.scalar_type();
  const Tensor y = empty_like_of(x, sizes_with_last(x, spec.rows), type);
  if (y.numel() == 0) return y;
  const RoundedRows act = rounded_rows(as_matrix(x, spec.cols), threshold);
  const Tensor scales = aten::reshape(w.row_scales(), {1, spec.rows});
  const Tensor unit = aten::scalar(x, kInt8Unit, ScalarType::Float);
  const Tensor result = as_matrix(y, spec.rows);
  const std::int64_t inputs = result.size(0), block = kExactFloats / term;
  const std::int64_t step = std::clamp<std::int64_t>(most / spec.cols, 1, spec.rows);
  const std::int64_t tall =
      std::clamp<std::int64_t>(most / (step * ceil_div(spec.cols, block)), 1, inputs);
  for (std::int64_t begin = 0; begin < spec.rows; begin += step) {
    const std::int64_t count = std::min(step, spec.rows - begin);
    const Panel panel{begin, begin + count, 0, spec.cols};
    const Tensor numbers = w.numbers(panel);
    const Tensor dense =
        threshold > 0.0F ? aten::cast(w.decoded(panel, type), ScalarType::Float) : numbers;
    const Tensor scale = aten::narrow(scales, 1, begin, count);
    for (std::int64_t m = 0; m < inputs; m += tall) {
      const auto rows = [&](const Tensor& t) {
        return aten::narrow(t, 0, m, std::min(tall, inputs - m));
      };
      const Tensor outer = aten::multiply(rows(act.scale), scale);
      Tensor v = aten::multiply(exact_product(rows(act.q), numbers, block), outer);
      v = aten::multiply(v, unit);
      if (bias) {
        const Tensor part = aten::narrow(*bias, 0, begin, count);
        v = aten::add(v, aten::cast(part, ScalarType::Float));
      }
      if (threshold > 0.0F) {
        v = aten::add(aten::cast(aten::cast(v, type), ScalarType::Float),
                      product(rows(act.rest), dense));
      }
      Tensor target = aten::narrow(rows(result), 1, begin, count);
      stable::copy_(target, v);
    }
  }
  return y;
}

}  // namespace quantal::stable_ops

// Ops about packed weights alone, on torch's stable ABI (see ops_stable.cpp).
//
//   row_square_sums(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype)
//       -> Tensor
//       [rows], of the exact values, as float64 or, for devices that have none, float32
//   sampled_error(Tensor weight, Tensor codes, Tensor stats, Tensor shared, int[] spec) -> float
//       of evenly spaced rows of a dense [rows, cols] (kernels.h)
//   merge_survival(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes, Tensor new_stats,
//                  Tensor new_shared, int[] spec, Tensor target) -> Tensor
//       float64 [4] on the CPU: codes changed, norm of the wanted change, surviving part, noise
//       (survival.h)
//   byte_sums(Tensor codes, Tensor stats) -> (int, int)
//       of their bytes as words of 64 bits, zeros after the last byte; a sum wraps

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>
#include <tuple>

#include "kernels/tasks.h"
#include "torch/ops_cpu.h"
#include "torch/ops_link.h"
#include "torch/stable_executor.h"
#include "torch/stable_tensor.h"
#include "torch/survival.h"

namespace quantal {
void link_weight_ops() noexcept {}
}  // namespace quantal

namespace quantal::stable_ops {
namespace {

Tensor row_square_sums_cpu(Tensor codes, Tensor stats, Tensor shared, Ints spec_ints,
                           ScalarType type) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  check_sum_dtype(type);
  const std::vector<double> sums = row_square_sums(w.view, stable_executor());
  Tensor out = empty_like_of(codes, {w.view.spec.rows}, ScalarType::Double);
  std::ranges::copy(sums, static_cast<double*>(out.mutable_data_ptr()));
  return stable::to(out, type);
}

}  // namespace

void check_sum_dtype(ScalarType type) {
  if (type == ScalarType::Double || type == ScalarType::Float) return;
  fail(Errc::kDtype, std::string("quantal::row_square_sums: dtype is ") + type_name(type) +
                         ", expected float64 or float32");
}

double sampled_error_cpu(Tensor weight, Tensor codes, Tensor stats, Tensor shared, Ints spec_ints) {
  const Packed w = packed_of(codes, stats, shared, spec_ints);
  const PackedSpec& spec = w.view.spec;
  const DType dtype = weight_dtype("quantal::sampled_error: weight", weight.scalar_type());
  const Rows rows("quantal::sampled_error: weight", weight, spec.cols);
  if (rows.count() != spec.rows) {
    fail(Errc::kShape, "quantal::sampled_error: weight has " + std::to_string(rows.count()) +
                           " rows, expected " + std::to_string(spec.rows));
  }
  return sampled_error(w.view, dtype, rows.data());
}

Tensor merge_survival_cpu(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes,
                          Tensor new_stats, Tensor new_shared, Ints spec_ints, Tensor target) {
  const Packed before = packed_of(codes, stats, shared, spec_ints);
  const Packed after = packed_of(new_codes, new_stats, new_shared, spec_ints);
  const PackedSpec& spec = before.view.spec;
  weight_dtype("quantal::merge_survival: target", target.scalar_type());
  const Rows rows("quantal::merge_survival: target", target, spec.cols);
  if (rows.count() != spec.rows) {
    fail(Errc::kShape, "quantal::merge_survival: target has " + std::to_string(rows.count()) +
                           " rows, expected " + std::to_string(spec.rows));
  }
  const Tensor dense = stable::to(rows.matrix(), ScalarType::Float);
  const Survival s =
      measure_survival(before.view, after.view, static_cast<const float*>(dense.const_data_ptr()),
                       stable_executor());
  Tensor out = empty_like_of(codes, {4}, ScalarType::Double);
  auto* values = static_cast<double*>(out.mutable_data_ptr());
  values[0] = static_cast<double>(s.codes_changed);
  values[1] = s.delta_norm;
  values[2] = s.surviving;
  values[3] = s.noise;
  return out;
}

namespace {

std::uint64_t word_at(const std::uint8_t* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

constexpr std::size_t kWord = 8, kLanes = 8;

std::uint64_t byte_sum(const std::uint8_t* data, std::size_t bytes) {
  std::array<std::uint64_t, kLanes> lanes{};
  std::size_t begin = 0;
  for (; begin + kLanes * kWord <= bytes; begin += kLanes * kWord) {
    for (std::size_t l = 0; l < kLanes; ++l) lanes[l] += word_at(data + begin + l * kWord);
  }
  std::uint64_t total = std::accumulate(lanes.begin(), lanes.end(), std::uint64_t{0});
  for (; begin + kWord <= bytes; begin += kWord) total += word_at(data + begin);
  std::array<std::uint8_t, kWord> last{};
  std::copy(data + begin, data + bytes, last.begin());
  return total + word_at(last.data());
}

std::int64_t byte_sum(const char* what, const Tensor& t) {
  check_cpu(what, t);
  const Tensor whole = t.is_contiguous() ? t : stable::contiguous(t);
  const auto bytes = static_cast<std::int64_t>(whole.element_size()) * whole.numel();
  const auto* data = static_cast<const std::uint8_t*>(whole.const_data_ptr());
  constexpr std::int64_t kUnit = kWord * kLanes, kUnitsPerTask = 4096;
  std::atomic<std::uint64_t> total{0};  // a sum that wraps has no order
  run_tasks(stable_executor(), ceil_div(bytes, kUnit), kUnitsPerTask,
            [&](std::int64_t begin, std::int64_t end) {
              const std::int64_t size = std::min(bytes, end * kUnit) - begin * kUnit;
              total.fetch_add(byte_sum(data + begin * kUnit, static_cast<std::size_t>(size)),
                              std::memory_order_relaxed);
            });
  return static_cast<std::int64_t>(total.load());
}

std::tuple<std::int64_t, std::int64_t> byte_sums_cpu(Tensor codes, Tensor stats) {
  return {byte_sum("quantal::byte_sums: codes", codes),
          byte_sum("quantal::byte_sums: stats", stats)};
}

Tensor row_square_sums_meta(Tensor codes, Tensor, Tensor, Ints spec_ints, ScalarType type) {
  check_sum_dtype(type);
  return empty_like_of(codes, {spec_from_ints(spec_ints).rows}, type);
}
Tensor merge_survival_meta(Tensor codes, Tensor, Tensor, Tensor, Tensor, Tensor, Ints, Tensor) {
  return empty_like_of(codes, {4}, ScalarType::Double);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(quantal, m) {
  m.def(
      "row_square_sums(Tensor codes, Tensor stats, Tensor shared, int[] spec, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "sampled_error(Tensor weight, Tensor codes, Tensor stats, Tensor shared, int[] spec) "
      "-> float");
  m.def(
      "merge_survival(Tensor codes, Tensor stats, Tensor shared, Tensor new_codes, "
      "Tensor new_stats, Tensor new_shared, int[] spec, Tensor target) -> Tensor");
  m.def("byte_sums(Tensor codes, Tensor stats) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(quantal, CPU, m) {
  m.impl("row_square_sums", TORCH_BOX(&row_square_sums_cpu));
  m.impl("sampled_error", TORCH_BOX(&sampled_error_cpu));
  m.impl("merge_survival", TORCH_BOX(&merge_survival_cpu));
  m.impl("byte_sums", TORCH_BOX(&byte_sums_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("row_square_sums", TORCH_BOX(&row_square_sums_meta));
  m.impl("merge_survival", TORCH_BOX(&merge_survival_meta));
}

}  // namespace quantal::stable_ops

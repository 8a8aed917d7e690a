#include "formats/tensors.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

namespace quantal {
namespace {

std::string where_name(std::string_view where, const std::string& name) {
  return std::string(where) + ": tensor " + name;
}

float read_weight(WeightRun w, std::int64_t i) {
  float value = 0;
  widen_to_f32(w.dtype, w.at(i).data, 1, &value);
  return value;
}

template <std::int64_t kItem>
void interleave_items(std::int64_t begin, std::int64_t end, const std::uint8_t* first,
                      const std::uint8_t* second, std::uint8_t* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    std::memcpy(out + 2 * kItem * i, first + kItem * i, kItem);
    std::memcpy(out + 2 * kItem * i + kItem, second + kItem * i, kItem);
  }
}

template <class T>
std::vector<double> row_sums(std::span<const T> values, std::int64_t step, std::int64_t rows,
                             std::int64_t cols, const Executor& executor) {
  std::vector<double> sums(static_cast<std::size_t>(rows));
  // Values of the rows before `row`.
  const auto before = [&](std::int64_t row) {
    return std::min(std::ssize(values), ceil_div(row * cols, step));
  };
  executor.parallel_for(0, rows, rows_per_task(ceil_div(cols, step)),
                        [&](std::int64_t begin, std::int64_t end) {
                          for (std::int64_t r = begin; r < end; ++r) {
                            double sum = 0;
                            for (std::int64_t i = before(r); i < before(r + 1); ++i) {
                              sum += static_cast<double>(values[static_cast<std::size_t>(i)]);
                            }
                            sums[static_cast<std::size_t>(r)] = sum;
                          }
                        });
  return sums;
}

}  // namespace

const TensorView& require_tensor(const TensorLookup& lookup, const std::string& name,
                                 std::string_view where) {
  const TensorView* tensor = lookup(name);
  if (tensor == nullptr) {
    fail(Errc::kCorrupt, where_name(where, name) + " is missing", {.path = {}, .tensor = name});
  }
  return *tensor;
}

void require_dtype(const TensorView& tensor, const std::string& name, std::string_view where,
                   std::span<const DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.dtype) == allowed.end()) {
    std::string legal;
    for (const DType d : allowed) legal += (legal.empty() ? "" : ", ") + std::string(dtype_name(d));
    fail(Errc::kDtype,
         where_name(where, name) + " has dtype " + std::string(dtype_name(tensor.dtype)) +
             ", expected one of " + legal,
         {.path = {}, .tensor = name});
  }
  const std::int64_t bytes =
      checked_mul(tensor.numel(), static_cast<std::int64_t>(dtype_size(tensor.dtype)), name);
  if (static_cast<std::int64_t>(tensor.bytes.size()) != bytes) {
    fail(Errc::kCorrupt,
         where_name(where, name) + " has " + std::to_string(tensor.bytes.size()) +
             " bytes, expected " + std::to_string(bytes) + " for shape " +
             shape_string(tensor.shape),
         {.path = {}, .tensor = name});
  }
}

void require_numel(const TensorView& tensor, const std::string& name, std::string_view where,
                   std::int64_t expected) {
  if (tensor.numel() == expected) return;
  fail(Errc::kShape,
       where_name(where, name) + " has shape " + shape_string(tensor.shape) + " with " +
           std::to_string(tensor.numel()) + " elements, expected " + std::to_string(expected),
       {.path = {}, .tensor = name});
}

Tensor tensor_of(DType dtype, std::vector<std::int64_t> shape,
                 std::span<const std::uint8_t> bytes) {
  return {dtype, std::move(shape), {bytes.begin(), bytes.end()}};
}

Tensor tensor_of_text(std::string_view text) {
  return {DType::kU8, {static_cast<std::int64_t>(text.size())}, {text.begin(), text.end()}};
}

std::string text_of(const TensorView& tensor) { return {tensor.bytes.begin(), tensor.bytes.end()}; }

std::string python_repr(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<std::size_t>(end.ptr - buffer));
  const std::size_t e = text.find('e');
  int exponent = 0;
  const std::size_t digits_at = text[e + 1] == '+' ? e + 2 : e + 1;
  std::from_chars(text.data() + digits_at, text.data() + text.size(), exponent);
  if (exponent < -4 || exponent >= 16) return std::string(text);  // same form in both languages
  char fixed[400];
  const auto fixed_end =
      std::to_chars(fixed, fixed + sizeof(fixed), value, std::chars_format::fixed);
  std::string out(fixed, static_cast<std::size_t>(fixed_end.ptr - fixed));
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

ScaleSource scale_source_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ScaleSource::kF32;
    case DType::kF16:
      return ScaleSource::kF16;
    case DType::kBF16:
      return ScaleSource::kBF16;
    default:
      fail(Errc::kDtype, "scale: dtype is " + std::string(dtype_name(dtype)) +
                             ", expected one of f32, f16, bf16");
  }
}

DType scale_dtype(ScaleSource source) {
  switch (source) {
    case ScaleSource::kF32:
      return DType::kF32;
    case ScaleSource::kF16:
      return DType::kF16;
    case ScaleSource::kBF16:
      return DType::kBF16;
    case ScaleSource::kE8M0:
      return DType::kF8E8M0;
    case ScaleSource::kE4M3:
      return DType::kF8E4M3;
    case ScaleSource::kSuperI8:
      return DType::kI8;
    case ScaleSource::kSuperU8:
    case ScaleSource::kSuperU4:
    case ScaleSource::kNestedU8:
      return DType::kU8;
  }
  return DType::kU8;
}

void refuse_not_finite(std::string_view where, WeightRun weights, std::int64_t rows,
                       std::int64_t cols) {
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    const float value = read_weight(weights, i);
    if (std::isfinite(value)) continue;
    fail(Errc::kUnsupported, std::string(where) + ": weight at row " + std::to_string(i / cols) +
                                 ", column " + std::to_string(i % cols) + " is " +
                                 (std::isnan(value) ? "nan"
                                  : value > 0       ? "inf"
                                                    : "-inf") +
                                 ", expected finite numbers");
  }
}

std::int64_t rows_per_task(std::int64_t cols) {
  constexpr std::int64_t kElements = 32768;
  return std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(1, cols));
}

std::vector<double> sums_by_row(std::span<const float> values, std::int64_t step, std::int64_t rows,
                                std::int64_t cols, const Executor& executor) {
  return row_sums(values, step, rows, cols, executor);
}

std::vector<double> sums_by_row(std::span<const double> values, std::int64_t step,
                                std::int64_t rows, std::int64_t cols, const Executor& executor) {
  return row_sums(values, step, rows, cols, executor);
}

void interleave(std::size_t item, std::int64_t n, const std::uint8_t* first,
                const std::uint8_t* second, std::uint8_t* out, const Executor& executor) {
  constexpr std::int64_t kPairsPerTask = 16384;
  executor.parallel_for(0, n, kPairsPerTask, [&](std::int64_t begin, std::int64_t end) {
    if (item == 2) {
      interleave_items<2>(begin, end, first, second, out);
    } else {
      interleave_items<4>(begin, end, first, second, out);
    }
  });
}

void spread_rows(PackedSpec spec, const FlatStats& flat, RowRange rows, std::uint8_t* stats,
                 const Executor& executor) {
  spec.rows = rows.size();
  spread_stats(spec, flat, rows.begin, stats, executor);
}

std::string join_numbers(std::span<const std::int64_t> numbers) {
  std::string out;
  for (const std::int64_t n : numbers) out += (out.empty() ? "" : ", ") + std::to_string(n);
  return out;
}

}  // namespace quantal

// The product of LLM.int8: rows of activations to int8, exact integer dot products, outlier columns
// through dequantized weights (quantal/kernels.h).
#include <algorithm>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/int8_kernels.h"
#include "kernels/layout.h"
#include "kernels/llm_int8.h"
#include "quantal/kernels.h"

namespace quantal {
namespace {

constexpr std::string_view kWhere = "matmul_int8";
constexpr std::int64_t kTaskProducts = 256 * 1024;  // of one task

DType scale_dtype(ScaleSource source) {
  return source == ScaleSource::kF32   ? DType::kF32
         : source == ScaleSource::kF16 ? DType::kF16
                                       : DType::kBF16;
}

/// All activations in integers, and what they leave out.
struct RoundedRows {
  std::int64_t rows = 0, cols = 0, ld = 0;
  std::vector<std::int8_t> q;          // [rows, ld], zero beyond cols
  std::vector<float> scale;            // [rows]
  std::vector<std::int64_t> sum;       // [rows] of q
  std::vector<std::int64_t> outliers;  // ascending columns
  std::vector<float> outlier_values;   // [rows, outliers], of the activations' own type
};

class Quantizer {
 public:
  Quantizer(const CpuKernels& kernels, FloatKind kind, const void* x, RoundedRows& out)
      : kernels_(kernels),
        kind_(kind),
        bytes_(kind == FloatKind::kF32 ? 4 : 2),
        x_(static_cast<const std::uint8_t*>(x)),
        out_(out) {}

  void run(float threshold, const Executor& executor) {
    std::vector<float> columns(static_cast<std::size_t>(out_.ld), 0.0F);
    if (threshold > 0.0F) mark(threshold, columns, executor);
    for (std::int64_t c = 0; c < out_.cols; ++c) {
      if (columns[static_cast<std::size_t>(c)] != 0.0F) out_.outliers.push_back(c);
    }
    out_.outlier_values.resize(static_cast<std::size_t>(out_.rows) * out_.outliers.size());
    for_rows(executor, [&](std::int64_t m, float* row) {
      const auto i = static_cast<std::size_t>(m);
      float* values = out_.outlier_values.data() + i * out_.outliers.size();
      for (std::size_t j = 0; j < out_.outliers.size(); ++j) {
        values[j] = row[out_.outliers[j]];
      }
      kernels_.int8().round_and_mark(row, out_.ld, 0.0F, nullptr);
      std::int8_t* q = out_.q.data() + m * out_.ld;
      out_.scale[i] = kernels_.int8().quantize(row, out_.ld, threshold, columns.data(), q);
      std::int64_t sum = 0;
      for (std::int64_t c = 0; c < out_.cols; ++c) sum += q[c];
      out_.sum[i] = sum;
    });
  }

 private:
  /// body(m, row m as float32, zero-padded to whole vectors).
  template <class Body>
  void for_rows(const Executor& executor, Body body) const {
    const std::int64_t grain = ceil_div(kTaskProducts, 4 * out_.ld);
    executor.parallel_for(0, out_.rows, grain, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> row(static_cast<std::size_t>(out_.ld), 0.0F);
      for (std::int64_t m = begin; m < end; ++m) {
        kernels_.widen(kind_, x_ + m * out_.cols * bytes_, out_.cols, row.data());
        body(m, row.data());
      }
    });
  }
  void mark(float threshold, std::vector<float>& columns, const Executor& executor) const {
    std::mutex merging;
    for_rows(executor, [&](std::int64_t /*m*/, float* row) {
      std::vector<float> marked(columns.size(), 0.0F);
      kernels_.int8().round_and_mark(row, out_.ld, threshold, marked.data());
      const std::lock_guard<std::mutex> lock(merging);
      for (std::size_t c = 0; c < marked.size(); ++c) columns[c] = std::max(columns[c], marked[c]);
    });
  }

  const CpuKernels& kernels_;
  FloatKind kind_;
  std::int64_t bytes_;
  const std::uint8_t* x_;
  RoundedRows& out_;
};

/// Output rows of some weight rows.
class Product {
 public:
  Product(const CpuKernels& kernels, const PackedView& w, DType dtype, const RoundedRows& x,
          const float* bias, void* y)
      : kernels_(kernels),
        w_(w),
        layout_(layout_of(w.spec)),
        dtype_(dtype),
        x_(x),
        bias_(bias),
        y_(static_cast<std::uint8_t*>(y)) {}

  /// Weight rows [begin, end), end - begin <= kInt8Rows.
  void run(std::int64_t begin, std::int64_t end) const {
    const auto rows = static_cast<int>(end - begin);
    float scales[kInt8Rows] = {};
    for (int r = 0; r < rows; ++r) {
      widen_to_f32(scale_dtype(w_.spec.scale), w_.stats.data() + (begin + r) * layout_.stat_bytes,
                   1, scales + r);
    }
    const std::vector<float> weights = outlier_weights(begin, rows, scales);
    for (std::int64_t m = 0; m < x_.rows; m += kInt8Inputs) {
      const auto inputs = static_cast<int>(std::min<std::int64_t>(kInt8Inputs, x_.rows - m));
      std::int64_t sums[kInt8Rows * kInt8Inputs] = {};
      dot(begin, rows, m, inputs, sums);
      for (int i = 0; i < inputs; ++i) {
        store(begin, rows, m + i, sums + i * kInt8Rows, scales, weights);
      }
    }
  }

 private:
  void dot(std::int64_t row, int rows, std::int64_t m, int inputs, std::int64_t* sums) const {
    for (std::int64_t k = 0; k < x_.cols; k += kInt8Columns) {
      const Int8Tile tile{.codes = w_.codes.data() + row * layout_.code_bytes + k,
                          .code_stride = layout_.code_bytes,
                          .rows = rows,
                          .x = x_.q.data() + m * x_.ld + k,
                          .x_stride = x_.ld,
                          .inputs = inputs,
                          .cols = std::min(kInt8Columns, x_.cols - k)};
      std::int32_t part[kInt8Rows * kInt8Inputs] = {};
      kernels_.int8().dot(tile, part);
      for (int i = 0; i < kInt8Rows * kInt8Inputs; ++i) sums[i] += part[i];
    }
    for (int i = 0; i < inputs; ++i) {  // codes are above their numbers by the centre
      for (int r = 0; r < rows; ++r) {
        sums[i * kInt8Rows + r] -= w_.spec.centre * x_.sum[static_cast<std::size_t>(m + i)];
      }
    }
  }

  /// Values of the outlier columns in the activations' type, [outliers, kInt8Rows].
  std::vector<float> outlier_weights(std::int64_t row, int rows, const float* scales) const {
    std::vector<float> values(x_.outliers.size() * kInt8Rows);
    for (int r = 0; r < rows; ++r) {
      const std::uint8_t* codes = w_.codes.data() + (row + r) * layout_.code_bytes;
      for (std::size_t j = 0; j < x_.outliers.size(); ++j) {
        const int number = codes[x_.outliers[j]] - w_.spec.centre;
        values[j * kInt8Rows + static_cast<std::size_t>(r)] =
            static_cast<float>(number) * scales[r];
      }
    }
    round(w_.spec.value_dtype, values);
    for (float& v : values) v = v * kInverse127;
    round(w_.spec.value_dtype, values);
    round(dtype_, values);
    return values;
  }

  static void round(DType dtype, std::span<float> values) {
    if (dtype == DType::kF32 || values.empty()) return;
    const auto n = static_cast<std::int64_t>(values.size());
    std::vector<std::uint16_t> halves(values.size());
    narrow_from_f32(dtype, values.data(), n, halves.data());
    widen_to_f32(dtype, halves.data(), n, values.data());
  }

  /// y = dtype(sum * (SCA * SCB) * c + bias); with outliers dtype(y + sum over them).
  void store(std::int64_t row, int rows, std::int64_t m, const std::int64_t* sums,
             const float* scales, const std::vector<float>& weights) const {
    float out[kInt8Rows] = {};
    for (int r = 0; r < rows; ++r) {
      const float outer = x_.scale[static_cast<std::size_t>(m)] * scales[r];
      out[r] = static_cast<float>(sums[r]) * outer * kInt8Unit;
      if (bias_ != nullptr) out[r] = out[r] + bias_[row + r];
    }
    const std::size_t count = x_.outliers.size();
    if (count != 0) {
      float extra[kInt8Rows] = {};
      const float* values = x_.outlier_values.data() + static_cast<std::size_t>(m) * count;
      for (std::size_t j = 0; j < count; ++j) {
        for (std::size_t r = 0; r < kInt8Rows; ++r) {
          extra[r] = extra[r] + values[j] * weights[j * kInt8Rows + r];
        }
      }
      round(dtype_, out);
      for (int r = 0; r < rows; ++r) out[r] = out[r] + extra[r];
    }
    const auto element = static_cast<std::int64_t>(dtype_size(dtype_));
    narrow_from_f32(dtype_, out, rows, y_ + (m * w_.spec.rows + row) * element);
  }

  const CpuKernels& kernels_;
  const PackedView& w_;
  const PackedLayout layout_;
  DType dtype_;
  const RoundedRows& x_;
  const float* bias_;
  std::uint8_t* y_;
};

}  // namespace

void check_llm_int8(const PackedSpec& s, float threshold) {
  const bool integer = s.bits == 8 && s.code_map == CodeMap::kInteger;
  if (!integer || s.offset != Offset::kOver127 || s.group_map != GroupMap::kRowRuns ||
      s.group_size != s.cols || scale_bytes(s.scale) == 1) {
    fail(Errc::kUnsupported, std::string(kWhere) + ": weights are " + std::to_string(s.bits) +
                                 " bits in groups of " + std::to_string(s.group_size) +
                                 ", expected 8-bit integers over 127 with one scale per row of " +
                                 std::to_string(s.cols));
  }
  if (!(threshold >= 0.0F)) {
    fail(Errc::kConfig,
         std::string(kWhere) + ": threshold is " + std::to_string(threshold) + ", expected >= 0");
  }
}

void matmul_int8(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows,
                 const float* bias, float threshold, void* y, const Executor& executor) {
  check_packed(w);
  const FloatKind kind = float_kind(dtype, "matmul_int8", "dtype");
  check_llm_int8(w.spec, threshold);
  if (m_rows < 0) {
    fail(Errc::kShape,
         std::string(kWhere) + ": m_rows is " + std::to_string(m_rows) + ", expected >= 0");
  }
  const CpuKernels& kernels = cpu_kernels();
  RoundedRows act;
  act.rows = m_rows;
  act.cols = w.spec.cols;
  act.ld = ceil_div(act.cols, 16) * 16;
  act.q.resize(static_cast<std::size_t>(checked_mul(m_rows, act.ld, "matmul_int8: activations")));
  act.scale.resize(static_cast<std::size_t>(m_rows));
  act.sum.resize(static_cast<std::size_t>(m_rows));
  Quantizer(kernels, kind, x, act).run(threshold, executor);
  const Product product(kernels, w, dtype, act, bias, y);
  const std::int64_t work = kInt8Rows * act.cols * std::max<std::int64_t>(m_rows, 1);
  executor.parallel_for(0, ceil_div(w.spec.rows, kInt8Rows), ceil_div(kTaskProducts, work),
                        [&](std::int64_t begin, std::int64_t end) {
                          for (std::int64_t tile = begin; tile < end; ++tile) {
                            product.run(tile * kInt8Rows,
                                        std::min((tile + 1) * kInt8Rows, w.spec.rows));
                          }
                        });
}

}  // namespace quantal

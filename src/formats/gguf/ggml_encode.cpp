// encode_ggml: plain floats, the rows of a matrix and their errors.
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "formats/gguf/gguf_encode.h"
#include "formats/gguf/gguf_params.h"
#include "formats/tensors.h"
#include "kernels/block_quantize.h"

namespace quantal {
namespace gguf {
namespace {

constexpr std::int64_t kChunk = 1024;

/// Writes weights as F32, F16 or BF16. NaN and infinities stay what they are; a finite weight that
/// would become infinite is refused.
EncodeStatus convert(GgmlType type, WeightRun weights, std::int64_t n, std::uint8_t* out) {
  const DType target = type == GgmlType::kF32   ? DType::kF32
                       : type == GgmlType::kF16 ? DType::kF16
                                                : DType::kBF16;
  const auto size = static_cast<std::int64_t>(dtype_size(target));
  alignas(16) float wide[kChunk];
  alignas(16) std::uint16_t narrow[kChunk];
  for (std::int64_t i = 0; i < n; i += kChunk) {
    const std::int64_t count = std::min(kChunk, n - i);
    widen_to_f32(weights.dtype, weights.at(i).data, count, wide);
    const void* result = wide;
    if (target != DType::kF32) {
      narrow_from_f32(target, wide, count, narrow);
      result = narrow;
      const int exponent = target == DType::kF16 ? 0x7C00 : 0x7F80;
      for (std::int64_t k = 0; k < count; ++k) {
        if ((narrow[k] & exponent) == exponent && std::isfinite(wide[k])) {
          return EncodeStatus::kTooLarge;
        }
      }
    }
    std::memcpy(out + i * size, result, static_cast<std::size_t>(count * size));
  }
  return EncodeStatus::kDone;
}

EncodeStatus encode_row(GgmlType type, WeightRun weights, std::int64_t cols, std::uint8_t* out) {
  switch (type) {
    case GgmlType::kF32:
    case GgmlType::kF16:
    case GgmlType::kBF16:
      return convert(type, weights, cols, out);
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K:
    case GgmlType::kQ6_K:
      return encode_blocks256(type, weights, cols, out);
    case GgmlType::kIQ4_NL:
      return encode_iq4_nl(weights, cols, out);
    default:
      return encode_blocks32(type, weights, cols, out);
  }
}

/// Names the largest weight of the first row that failed for its size.
[[noreturn]] void refuse_too_large(GgmlType type, WeightRun weights, std::int64_t row,
                                   std::int64_t cols) {
  std::vector<float> wide(static_cast<std::size_t>(cols));
  widen_to_f32(weights.dtype, weights.at(row * cols).data, cols, wide.data());
  std::size_t at = 0;
  for (std::size_t i = 0; i < wide.size(); ++i) {
    if (std::isfinite(wide[i]) && std::fabs(wide[i]) > std::fabs(wide[at])) at = i;
  }
  fail(Errc::kUnsupported, "gguf: weight at row " + std::to_string(row) + ", column " +
                               std::to_string(at) + " is " + python_repr(double{wide[at]}) +
                               ", expected weights whose scale a binary16 can hold (" +
                               std::string(ggml_block(type).name) + ")");
}

}  // namespace

RowEncoder::RowEncoder(GgmlType type, WeightRun weights, std::int64_t rows, std::int64_t cols)
    : type_(type),
      weights_(weights),
      rows_(rows),
      cols_(cols),
      row_bytes_(ggml_bytes(type, 1, cols)),
      failed_(rows) {}

bool RowEncoder::encode(std::int64_t begin, std::int64_t end, std::uint8_t* out) {
  for (std::int64_t r = begin; r < end; ++r, out += row_bytes_) {
    std::int64_t seen = failed_.load(std::memory_order_relaxed);
    if (seen <= r) return false;
    if (encode_row(type_, weights_.at(r * cols_), cols_, out) == EncodeStatus::kDone) continue;
    while (r < seen && !failed_.compare_exchange_weak(seen, r)) {
    }
    return false;
  }
  return true;
}

void RowEncoder::check() const {
  const std::int64_t row = failed_.load();
  if (row == rows_) return;
  const bool plain = !ggml_packable(type_);
  if (!plain) refuse_not_finite("gguf", weights_, row + 1, cols_);
  refuse_too_large(type_, weights_, row, cols_);
}

}  // namespace gguf

bool ggml_encodable(GgmlType type) noexcept {
  switch (type) {
    case GgmlType::kF32:
    case GgmlType::kF16:
    case GgmlType::kBF16:
    case GgmlType::kQ4_0:
    case GgmlType::kQ4_1:
    case GgmlType::kQ5_0:
    case GgmlType::kQ5_1:
    case GgmlType::kQ8_0:
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K:
    case GgmlType::kQ6_K:
    case GgmlType::kIQ4_NL:
      return true;
    default:
      return false;
  }
}

void encode_ggml(GgmlType type, DType dtype, const void* weights, std::int64_t rows,
                 std::int64_t cols, std::uint8_t* out, const Executor& executor) {
  if (!ggml_encodable(type)) {
    fail(Errc::kUnsupported,
         "gguf: target type is " + std::string(ggml_block(type).name) +
             ", expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, "
             "IQ4_NL");
  }
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, "gguf: weights have dtype " + std::string(dtype_name(dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  ggml_bytes(type, rows, cols);
  const std::int64_t row_bytes = ggml_bytes(type, 1, cols);
  gguf::RowEncoder encoder(type, {dtype, weights}, rows, cols);
  executor.parallel_for(0, rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
    encoder.encode(begin, end, out + begin * row_bytes);
  });
  encoder.check();
}

}  // namespace quantal

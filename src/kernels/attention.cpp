#include "quantal/attention.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/attention_blocks.h"
#include "kernels/attention_few.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/scratch.h"

namespace quantal {
namespace {

void check_size(std::int64_t actual, std::int64_t least, const char* what) {
  if (actual < least) {
    fail(Errc::kShape, "attention: " + std::string(what) + " is " + std::to_string(actual) +
                           ", expected >= " + std::to_string(least));
  }
}

void check_shape(const AttentionShape& shape) {
  check_size(shape.batch, 0, "batch");
  check_size(shape.heads, 1, "heads");
  check_size(shape.kv_heads, 1, "kv_heads");
  check_size(shape.queries, 0, "queries");
  check_size(shape.keys, shape.causal ? std::max<std::int64_t>(shape.queries, 1) : 1, "keys");
  check_size(shape.dim, 1, "dim");
  if (shape.heads % shape.kv_heads != 0) {
    fail(Errc::kShape, "attention: heads is " + std::to_string(shape.heads) +
                           ", expected a multiple of kv_heads " + std::to_string(shape.kv_heads));
  }
}

void check_runs(const AttentionShape& shape) {
  if (shape.causal || shape.run_end == nullptr) {
    fail(Errc::kShape, std::string("attention: runs are given with causal ") +
                           (shape.causal ? "true" : "false") + " and run_end " +
                           (shape.run_end == nullptr ? "null" : "not null") +
                           ", expected false and not null");
  }
  for (std::int64_t i = 0; i < shape.batch * shape.queries; ++i) {
    const std::int64_t begin = shape.run_begin[i], end = shape.run_end[i];
    if (begin < 0 || begin > end || end > shape.keys) {
      fail(Errc::kShape, "attention: run " + std::to_string(i) + " is " + std::to_string(begin) +
                             " to " + std::to_string(end) +
                             ", expected 0 <= begin <= end <= " + std::to_string(shape.keys));
    }
  }
}

/// The shape with runs for every query, in the calling thread's scratch unless they were given.
AttentionShape with_runs(AttentionShape shape) {
  if (shape.run_begin != nullptr) {
    check_runs(shape);
    return shape;
  }
  const std::int64_t count = checked_mul(shape.batch, shape.queries, "attention: queries");
  auto* begin = static_cast<std::int32_t*>(
      thread_scratch<Scratch::kRuns>(checked_mul(count, 2 * 4, "attention: runs")));
  std::int32_t* const end = begin + count;
  std::fill_n(begin, count, 0);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t seen = shape.keys - shape.queries + 1 + i % shape.queries;
    end[i] = static_cast<std::int32_t>(shape.causal ? seen : shape.keys);
  }
  shape.run_begin = begin;
  shape.run_end = end;
  return shape;
}

void check_taken(const AttentionShape& shape, DType dtype, bool with_gradient) {
  const std::string refusal = attention_refusal(shape, dtype, with_gradient);
  if (!refusal.empty()) fail(Errc::kUnsupported, "attention: " + refusal);
}

const BlockAttention* block_attention() {
  const auto kernels = cpu_kernels().block_attention;
  return kernels == nullptr ? nullptr : &kernels();
}

/// As attention_refusal, of the kernels of many rows.
std::string blocks_refusal(DType dtype) {
  if (dtype != DType::kBF16) {
    return "dtype is " + std::string(dtype_name(dtype)) + ", expected bf16";
  }
  if (block_attention() == nullptr) {
    return "kernel set is " + std::string(active_cpu_kernels()) + ", expected avx512bf16";
  }
  return "";
}

}  // namespace

bool runs_of_mask(const std::uint8_t* mask, std::int64_t rows, std::int64_t keys,
                  std::int64_t stride, std::int32_t* begin, std::int32_t* end) noexcept {
  for (std::int64_t r = 0; r < rows; ++r, mask += stride) {
    const auto* stop = mask + keys;
    const auto* first = std::find_if(mask, stop, [](std::uint8_t m) { return m != 0; });
    const auto left = static_cast<std::size_t>(stop - first);
    const auto* last =
        left == 0 ? stop : static_cast<const std::uint8_t*>(std::memchr(first, 0, left));
    if (last == nullptr) last = stop;
    // *last is 0, and each byte after it has to be what the one before is.
    if (stop - last > 1 &&
        std::memcmp(last, last + 1, static_cast<std::size_t>(stop - last - 1)) != 0) {
      return false;
    }
    begin[r] = static_cast<std::int32_t>(first - mask);
    end[r] = static_cast<std::int32_t>(last - mask);
  }
  return true;
}

std::string attention_refusal(const AttentionShape& shape, DType dtype, bool with_gradient) {
  check_shape(shape);
  constexpr std::int64_t kDimUnit = 16, kMaxKeys = std::int64_t{1} << 30;
  static_assert(BlockAttention::kMaxDim == FewRowsAttention::kMaxDim);
  if (!is_weight_dtype(dtype)) {
    return "dtype is " + std::string(dtype_name(dtype)) + ", expected f32, f16 or bf16";
  }
  if (shape.dim % kDimUnit != 0 || shape.dim > BlockAttention::kMaxDim) {
    return "dim is " + std::to_string(shape.dim) + ", expected a multiple of " +
           std::to_string(kDimUnit) + " up to " + std::to_string(BlockAttention::kMaxDim);
  }
  if (shape.keys > kMaxKeys) {
    return "keys is " + std::to_string(shape.keys) + ", expected <= " + std::to_string(kMaxKeys);
  }
  if (with_gradient) return blocks_refusal(dtype);
  const std::string few = few_rows_refusal(shape);
  if (few.empty()) return "";
  const std::string many = blocks_refusal(dtype);
  return many.empty() ? "" : few + "; for more, " + many;
}

void attention(const AttentionShape& shape, DType dtype, const AttentionInput& q,
               const AttentionInput& k, const AttentionInput& v, const AttentionOutput& out,
               float* lse, const Executor& executor) {
  check_taken(shape, dtype, false);
  const AttentionShape run = with_runs(shape);
  if (few_rows_refusal(shape).empty()) {
    attention_few_rows(run, dtype, q, k, v, out, lse, executor);
  } else {
    attention_blocks(*block_attention(), run, q, k, v, out, lse, executor);
  }
}

void attention_backward(const AttentionShape& shape, DType dtype, const AttentionSaved& saved,
                        const AttentionGradients& gradients, const Executor& executor) {
  check_taken(shape, dtype, true);
  attention_blocks_backward(*block_attention(), with_runs(shape), saved, gradients, executor);
}

}  // namespace quantal

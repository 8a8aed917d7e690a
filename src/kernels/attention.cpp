#include "quantal/attention.h"

#include <algorithm>
#include <string>

#include "kernels/attention_blocks.h"
#include "kernels/attention_few.h"
#include "kernels/cpu/dispatch.h"

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
  if (few_rows_refusal(shape).empty()) {
    attention_few_rows(shape, dtype, q, k, v, out, lse, executor);
  } else {
    attention_blocks(*block_attention(), shape, q, k, v, out, lse, executor);
  }
}

void attention_backward(const AttentionShape& shape, DType dtype, const AttentionSaved& saved,
                        const AttentionGradients& gradients, const Executor& executor) {
  check_taken(shape, dtype, true);
  attention_blocks_backward(*block_attention(), shape, saved, gradients, executor);
}

}  // namespace quantal

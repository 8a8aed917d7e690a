#include "quantal/attention.h"

#include <algorithm>
#include <string>

#include "kernels/cpu/attention_kernels.h"
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
  check_shape(shape);
  const std::string refusal = attention_refusal(shape, dtype, with_gradient);
  if (!refusal.empty()) fail(Errc::kUnsupported, "attention: " + refusal);
}

}  // namespace

std::string attention_refusal(const AttentionShape& shape, DType dtype, bool with_gradient) {
  static_cast<void>(shape);
  static_cast<void>(dtype);
  static_cast<void>(with_gradient);
  return "kernel set is " + std::string(active_cpu_kernels()) + ", expected one with attention";
}

void attention(const AttentionShape& shape, DType dtype, const AttentionInput& /*q*/,
               const AttentionInput& /*k*/, const AttentionInput& /*v*/,
               const AttentionOutput& /*out*/, float* lse, const Executor& /*executor*/) {
  check_taken(shape, dtype, lse != nullptr);
}

void attention_backward(const AttentionShape& shape, DType dtype, const AttentionSaved& /*saved*/,
                        const AttentionGradients& /*gradients*/, const Executor& /*executor*/) {
  check_taken(shape, dtype, true);
}

}  // namespace quantal

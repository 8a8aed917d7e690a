#include "quantal/attention_choice.h"

#include <algorithm>

namespace quantal {
namespace {

using Sizes = std::span<const std::int64_t>;
constexpr std::size_t kAxes = 4;

std::string with_sizes(const char* name, Sizes sizes) {
  return "attention: " + std::string(name) + " has shape " + shape_string(sizes);
}

void check_axes(const char* name, Sizes sizes) {
  if (sizes.size() == kAxes) return;
  fail(Errc::kShape, with_sizes(name, sizes) + ", expected [batch, heads, positions, dim]");
}

}  // namespace

AttentionShape attention_shape(Sizes q, Sizes k, Sizes v, bool causal, double scale) {
  check_axes("q", q);
  check_axes("k", k);
  const std::int64_t batch = q[0], heads = q[1], queries = q[2], dim = q[3];
  const std::int64_t kv_heads = k[1], keys = k[2];
  if (k[0] != batch || k[3] != dim) {
    fail(Errc::kShape, with_sizes("k", k) + ", expected [" + std::to_string(batch) +
                           ", kv_heads, keys, " + std::to_string(dim) + "] as q");
  }
  if (!std::ranges::equal(v, k)) {
    fail(Errc::kShape, with_sizes("v", v) + ", expected " + shape_string(k) + " as k");
  }
  return {.batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .queries = queries,
          .keys = keys,
          .dim = dim,
          .causal = causal,
          .scale = static_cast<float>(scale)};
}

std::string attention_gain_refusal(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                                   DType dtype, AttentionUse use) {
  constexpr std::int64_t kPositions = 512;  // of a text; no rule of the kernels is about its length
  AttentionShape shape{.batch = 1,
                       .heads = heads,
                       .kv_heads = kv_heads,
                       .queries = kPositions,
                       .keys = kPositions,
                       .dim = dim,
                       .causal = true,
                       .scale = 1};
  if (use == AttentionUse::kTraining) return attention_refusal(shape, dtype, true);
  std::string refusal = attention_refusal(shape, dtype, false);
  if (refusal.empty()) return refusal;
  shape.queries = 1;
  return attention_refusal(shape, dtype, false);
}

}  // namespace quantal

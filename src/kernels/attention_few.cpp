#include "kernels/attention_few.h"

#include <algorithm>

#include "kernels/attention_blocks.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/scratch.h"
#include "kernels/tasks.h"

namespace quantal {
namespace {

/// Products that are worth a task of their own; fewer in all run on the calling thread.
constexpr std::int64_t kTaskProducts = 128 * 1024;
/// Chunks have at least this many keys where there are as many, and less than twice that.
constexpr std::int64_t kChunkKeys = 512;
static_assert(2 * kChunkKeys <= FewRowsAttention::kKeys);

/// Keys of a chunk: nearly equal shares, whole vectors.
std::int64_t chunk_keys(std::int64_t keys) {
  const std::int64_t chunks = std::max<std::int64_t>(keys / kChunkKeys, 1);
  return ceil_div(ceil_div(keys, chunks), 16) * 16;
}

/// body(task) for all tasks.
template <class Body>
void for_tasks(const Executor& executor, std::int64_t tasks, std::int64_t products, Body body) {
  run_tasks(executor, tasks, ceil_div(kTaskProducts, products),
            [&body](std::int64_t begin, std::int64_t end) {
              for (std::int64_t t = begin; t < end; ++t) body(t);
            });
}

float* task_scratch(std::int64_t floats) {
  return static_cast<float*>(thread_scratch<Scratch::kSums>(4 * floats));
}

}  // namespace

std::string few_rows_refusal(const AttentionShape& shape) {
  const std::int64_t most = FewRowsAttention::kRows / group_of(shape);
  if (shape.queries <= most) return "";
  return "queries is " + std::to_string(shape.queries) + ", expected <= " + std::to_string(most) +
         " where " + std::to_string(group_of(shape)) + " heads share keys and values";
}

void attention_few_rows(const AttentionShape& shape, DType dtype, const AttentionInput& q,
                        const AttentionInput& k, const AttentionInput& v,
                        const AttentionOutput& out, float* lse, const Executor& executor) {
  if (shape.batch == 0 || shape.queries == 0) return;
  const FewRowsAttention& kernels = cpu_kernels().few_rows_attention();
  const FloatKind kind = float_kind(dtype, "attention", "dtype");
  const auto bytes = static_cast<std::int64_t>(dtype_size(dtype));
  const auto job = [&](std::int64_t problem) {
    return attention_job(shape, problem, q, k, v, out, lse, bytes);
  };
  const std::int64_t rows = group_of(shape) * shape.queries, step = chunk_keys(shape.keys);
  const std::int64_t floats = FewRowsAttention::part_floats(rows, shape.dim);
  const std::int64_t chunks = ceil_div(shape.keys, step), products = 2 * rows * step * shape.dim;
  const std::int64_t problems = checked_mul(shape.batch, shape.kv_heads, "attention: heads");
  const std::int64_t tasks = checked_mul(problems, chunks, "attention: chunks");
  if (chunks == 1) {
    return for_tasks(executor, tasks, products, [&](std::int64_t problem) {
      float* scratch = task_scratch(FewRowsAttention::kScratchFloats + floats);
      float* part = scratch + FewRowsAttention::kScratchFloats;
      const AttentionJob one = job(problem);
      kernels.part(one, kind, 0, shape.keys, scratch, part);
      kernels.finish(one, kind, part, 1);
    });
  }
  auto* parts = static_cast<float*>(
      thread_scratch<Scratch::kInputs>(checked_mul(tasks, 4 * floats, "attention: parts")));
  for_tasks(executor, tasks, products, [&](std::int64_t task) {
    const std::int64_t begin = task % chunks * step;
    kernels.part(job(task / chunks), kind, begin, std::min(begin + step, shape.keys),
                 task_scratch(FewRowsAttention::kScratchFloats), parts + task * floats);
  });
  for_tasks(executor, problems, chunks * floats, [&](std::int64_t problem) {
    kernels.finish(job(problem), kind, parts + problem * chunks * floats, chunks);
  });
}

}  // namespace quantal

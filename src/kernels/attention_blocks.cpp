#include "kernels/attention_blocks.h"

#include <algorithm>
#include <functional>

#include "kernels/scratch.h"

namespace quantal {
namespace {

constexpr std::int64_t kTaskProducts = 1 << 20;  // of one task, at least
constexpr std::int64_t kBf16Bytes = 2;

/// One head of keys and values, as rows: element 0 of sequence and first head of `x`.
template <class Strided>
AttentionRows rows_at(const Strided& x, std::int64_t sequence, std::int64_t head,
                      std::int64_t element_bytes) {
  const std::int64_t at = sequence * x.strides.batch + head * x.strides.head;
  auto* data = static_cast<std::uint8_t*>(const_cast<void*>(static_cast<const void*>(x.data)));
  return {data + at * element_bytes, x.strides.position, x.strides.head};
}

std::int64_t problems_of(const AttentionShape& shape) { return shape.batch * shape.kv_heads; }
std::int64_t blocks_of(const AttentionShape& shape) {
  return ceil_div(group_of(shape) * shape.queries, BlockAttention::kRows);
}

float* scratch_of(const AttentionShape& shape) {
  return static_cast<float*>(
      thread_scratch<Scratch::kSums>(BlockAttention::scratch_floats(shape.dim) * 4));
}

/// Calls body(first row, rows) for blocks [begin, end).
template <class Body>
void for_blocks(const AttentionJob& job, std::int64_t begin, std::int64_t end, Body body) {
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t row = b * BlockAttention::kRows;
    body(row, std::min(BlockAttention::kRows, job.rows - row));
  }
}

/// Into how many parts of its rows a problem is cut for the gradients, whose sums of keys and
/// values are then held for each part: by the number of problems, not of threads, which no bit may
/// depend on.
std::int64_t parts_of(const AttentionShape& shape) {
  constexpr std::int64_t kEnough = 8, kTasks = 16;
  const std::int64_t problems = problems_of(shape);
  if (problems >= kEnough) return 1;
  return std::clamp<std::int64_t>(blocks_of(shape), 1, ceil_div(kTasks, problems));
}

/// The gradients of one attention.
class Backward {
 public:
  Backward(const BlockAttention& kernels, const AttentionShape& shape, const AttentionSaved& saved,
           const AttentionGradients& gradients)
      : kernels_(kernels),
        shape_(shape),
        saved_(saved),
        gradients_(gradients),
        parts_(parts_of(shape)) {}

  void run(const Executor& executor) {
    if (parts_ > 1) {
      sums_ = static_cast<float*>(
          thread_scratch<Scratch::kInputs>(problems_of(shape_) * parts_ * sums_of_problem() * 4));
    }
    const auto tasks = [this](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) run_part(t / parts_, t % parts_);
    };
    executor.parallel_for(0, problems_of(shape_) * parts_, 1, std::ref(tasks));
    if (parts_ == 1) return;
    const auto rounds = [this](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t problem = r / shape_.keys, key = r % shape_.keys;
        store(problem, sums_ + problem * parts_ * sums_of_problem(), key, key + 1);
      }
    };
    constexpr std::int64_t kRoundGrain = 256;
    executor.parallel_for(0, problems_of(shape_) * shape_.keys, kRoundGrain, std::ref(rounds));
  }

 private:
  /// dk, then dv of one head of keys and values.
  std::int64_t sums_of_problem() const { return 2 * shape_.keys * shape_.dim; }

  void run_part(std::int64_t problem, std::int64_t part) const {
    float* sums =
        parts_ > 1 ? sums_ + (problem * parts_ + part) * sums_of_problem()
                   : static_cast<float*>(thread_scratch<Scratch::kInputs>(sums_of_problem() * 4));
    std::fill_n(sums, sums_of_problem(), 0.0F);
    const AttentionGradJob job = job_of(problem, sums);
    const std::int64_t blocks = blocks_of(shape_);
    for_blocks(job.job, part * blocks / parts_, (part + 1) * blocks / parts_,
               [&](std::int64_t row, std::int64_t rows) {
                 kernels_.backward(job, row, rows, scratch_of(shape_));
               });
    if (parts_ == 1) store(problem, sums, 0, shape_.keys);
  }

  AttentionGradJob job_of(std::int64_t problem, float* sums) const {
    const std::int64_t sequence = problem / shape_.kv_heads;
    const std::int64_t head = problem % shape_.kv_heads * group_of(shape_);
    const AttentionOutput out{const_cast<void*>(saved_.out.data), saved_.out.strides};
    return {.job = attention_job(shape_, problem, saved_.q, saved_.k, saved_.v, out,
                                 const_cast<float*>(saved_.lse), kBf16Bytes),
            .grad = rows_at(saved_.grad, sequence, head, kBf16Bytes),
            .dq = rows_at(gradients_.q, sequence, head, kBf16Bytes),
            .dk = sums,
            .dv = sums + sums_of_problem() / 2};
  }

  /// The gradients of keys and values [begin, end) from the sums of all parts.
  void store(std::int64_t problem, const float* sums, std::int64_t begin, std::int64_t end) const {
    const std::int64_t sequence = problem / shape_.kv_heads, head = problem % shape_.kv_heads;
    const auto store_one = [&](const AttentionOutput& to, const float* from, float scale) {
      const AttentionRows rows = rows_at(to, sequence, head, kBf16Bytes);
      for (std::int64_t key = begin; key < end; ++key) {
        kernels_.round(from + key * shape_.dim, parts_, sums_of_problem(), scale, shape_.dim,
                       static_cast<std::uint16_t*>(rows.data) + key * rows.position);
      }
    };
    store_one(gradients_.k, sums, shape_.scale);
    store_one(gradients_.v, sums + sums_of_problem() / 2, 1.0F);
  }

  const BlockAttention& kernels_;
  const AttentionShape& shape_;
  const AttentionSaved& saved_;
  const AttentionGradients& gradients_;
  const std::int64_t parts_;
  float* sums_ = nullptr;
};

}  // namespace

AttentionJob attention_job(const AttentionShape& shape, std::int64_t index, const AttentionInput& q,
                           const AttentionInput& k, const AttentionInput& v,
                           const AttentionOutput& out, float* lse, std::int64_t element_bytes) {
  const std::int64_t sequence = index / shape.kv_heads, kv_head = index % shape.kv_heads;
  const std::int64_t group = group_of(shape), head = kv_head * group;
  return {.q = rows_at(q, sequence, head, element_bytes),
          .k = rows_at(k, sequence, kv_head, element_bytes).data,
          .v = rows_at(v, sequence, kv_head, element_bytes).data,
          .k_stride = k.strides.position,
          .v_stride = v.strides.position,
          .out = rows_at(out, sequence, head, element_bytes),
          .lse = lse == nullptr ? nullptr : lse + (sequence * shape.heads + head) * shape.queries,
          .lse_head = shape.queries,
          .group = group,
          .rows = group * shape.queries,
          .keys = shape.keys,
          .dim = shape.dim,
          .begin = shape.run_begin + sequence * shape.queries,
          .end = shape.run_end + sequence * shape.queries,
          .scale = shape.scale};
}

void attention_blocks(const BlockAttention& kernels, const AttentionShape& shape,
                      const AttentionInput& q, const AttentionInput& k, const AttentionInput& v,
                      const AttentionOutput& out, float* lse, const Executor& executor) {
  const std::int64_t problems = problems_of(shape), blocks = blocks_of(shape);
  const auto tasks = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      // Later blocks of a causal problem see more keys: first and last ones in turn.
      const std::int64_t turn = t / problems;
      const std::int64_t block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
      const AttentionJob job = attention_job(shape, t % problems, q, k, v, out, lse, kBf16Bytes);
      for_blocks(job, block, block + 1, [&](std::int64_t row, std::int64_t rows) {
        kernels.forward(job, row, rows, scratch_of(shape));
      });
    }
  };
  const std::int64_t products = 2 * BlockAttention::kRows * shape.keys * shape.dim;
  executor.parallel_for(0, problems * blocks, ceil_div(kTaskProducts, products), std::ref(tasks));
}

void attention_blocks_backward(const BlockAttention& kernels, const AttentionShape& shape,
                               const AttentionSaved& saved, const AttentionGradients& gradients,
                               const Executor& executor) {
  if (problems_of(shape) == 0) return;
  Backward(kernels, shape, saved, gradients).run(executor);
}

}  // namespace quantal

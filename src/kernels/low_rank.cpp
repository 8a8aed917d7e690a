#include "quantal/low_rank.h"

#include <algorithm>
#include <string>

#include "core/half.h"
#include "kernels/cpu/dispatch.h"

namespace quantal {
namespace {

void check(const LowRank& w, std::int64_t m_rows) {
  for (const std::int64_t size : {w.in, w.out, w.rank, m_rows}) {
    if (size < 0) {
      fail(Errc::kShape, "low_rank: a size is " + std::to_string(size) + ", expected >= 0");
    }
  }
}

float load(DType dtype, const void* p, std::int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(p)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(p)[i];
  return dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}
void store(DType dtype, void* p, std::int64_t i, float v) {
  if (dtype == DType::kF32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<std::uint16_t*>(p)[i] = dtype == DType::kF16 ? f32_to_f16(v) : f32_to_bf16(v);
  }
}

}  // namespace

void add_low_rank(const LowRank& w, DType dtype, const void* x, std::int64_t m_rows, void* y,
                  float* t, const Executor& /*executor*/) {
  check(w, m_rows);
  float_kind(dtype, "low_rank", "dtype");
  for (std::int64_t m = 0; m < m_rows; ++m) {
    for (std::int64_t r = 0; r < w.rank; ++r) {
      float sum = 0;
      for (std::int64_t k = 0; k < w.in; ++k)
        sum += load(dtype, x, m * w.in + k) * w.a[r * w.in + k];
      t[m * w.rank + r] = w.scaling * sum;
    }
    for (std::int64_t n = 0; n < w.out; ++n) {
      float sum = 0;
      for (std::int64_t r = 0; r < w.rank; ++r) sum += t[m * w.rank + r] * w.b[n * w.rank + r];
      store(dtype, y, m * w.out + n, load(dtype, y, m * w.out + n) + sum);
    }
  }
}

void low_rank_backward(const LowRank& w, DType dtype, const void* grad, const void* x,
                       const float* t, std::int64_t m_rows, void* x_grad, float* a_grad,
                       float* b_grad, const Executor& /*executor*/) {
  check(w, m_rows);
  float_kind(dtype, "low_rank", "dtype");
  std::fill_n(a_grad, w.rank * w.in, 0.0F);
  std::fill_n(b_grad, w.rank * w.out, 0.0F);
  for (std::int64_t m = 0; m < m_rows; ++m) {
    for (std::int64_t r = 0; r < w.rank; ++r) {
      float d = 0;
      for (std::int64_t n = 0; n < w.out; ++n) {
        const float g = load(dtype, grad, m * w.out + n);
        d += g * w.b[n * w.rank + r];
        b_grad[n * w.rank + r] += g * t[m * w.rank + r];
      }
      d *= w.scaling;
      for (std::int64_t k = 0; k < w.in; ++k) {
        a_grad[r * w.in + k] += d * load(dtype, x, m * w.in + k);
        if (x_grad == nullptr) continue;
        const std::int64_t i = m * w.in + k;
        store(dtype, x_grad, i, load(dtype, x_grad, i) + d * w.a[r * w.in + k]);
      }
    }
  }
}

}  // namespace quantal

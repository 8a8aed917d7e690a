// What LoRA adds to a product and its gradients, against float64.
#include "quantal/low_rank.h"

#include <cmath>
#include <limits>

#include "core/half.h"
#include "kernels/support.h"

namespace quantal {
namespace {

using testing::OddExecutor;
using testing::Random;
using testing::ThreadExecutor;

/// A matrix of one element type, as bytes and as the float64 values of them.
struct Matrix {
  DType dtype;
  std::int64_t cols;
  std::vector<std::uint8_t> bytes;

  Matrix(DType type, std::int64_t rows, std::int64_t columns)
      : dtype(type),
        cols(columns),
        bytes(static_cast<std::size_t>(rows * columns) * dtype_size(type)) {}

  void fill(Random& random, float size) {
    for (std::size_t i = 0; i < bytes.size() / dtype_size(dtype); ++i) {
      set(i, random.uniform(-size, size));
    }
  }
  void set(std::size_t i, float v) {
    if (dtype == DType::kF32) {
      std::memcpy(bytes.data() + 4 * i, &v, 4);
      return;
    }
    const std::uint16_t half = dtype == DType::kF16 ? f32_to_f16(v) : f32_to_bf16(v);
    std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
  double at(std::int64_t r, std::int64_t c) const {
    const auto i = static_cast<std::size_t>(r * cols + c);
    float v = 0;
    std::uint16_t half = 0;
    if (dtype == DType::kF32) {
      std::memcpy(&v, bytes.data() + 4 * i, 4);
    } else {
      std::memcpy(&half, bytes.data() + 2 * i, 2);
      v = dtype == DType::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
    }
    return static_cast<double>(v);
  }
  std::vector<float> floats() const {
    std::vector<float> values(bytes.size() / 4);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
};

struct Case {
  std::int64_t rows, in, out, rank;
};
const Case kCases[] = {{1, 576, 192, 16}, {7, 33, 17, 3},     {8, 64, 100, 1},  {9, 100, 64, 8},
                       {49, 16, 1, 5},    {130, 200, 75, 24}, {65, 1, 130, 64}, {100, 129, 66, 7}};
const DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

/// A layer's change, forward and backward.
struct Change {
  Case sizes;
  Matrix x, y, grad, x_grad, a, b, t, a_grad, b_grad, y_before, x_grad_before;
  float scaling = 1.7F;

  Change(const Case& c, DType dtype, std::uint64_t seed)
      : sizes(c),
        x(dtype, c.rows, c.in),
        y(dtype, c.rows, c.out),
        grad(y),
        x_grad(x),
        a(DType::kF32, c.rank, c.in),
        b(DType::kF32, c.out, c.rank),
        t(DType::kF32, c.rows, c.rank),
        a_grad(a),
        b_grad(b),
        y_before(y),
        x_grad_before(x) {
    Random random(seed);
    for (Matrix* m : {&x, &y, &grad, &x_grad, &a, &b}) m->fill(random, 1.0F);
    for (Matrix* m : {&t, &a_grad, &b_grad}) {
      m->fill(random, std::numeric_limits<float>::quiet_NaN());
    }
    y_before = y;
    x_grad_before = x_grad;
  }

  void run(const Executor& executor, bool wants_x = true) {
    const auto wide_a = a.floats(), wide_b = b.floats();
    const LowRank w{sizes.in, sizes.out, sizes.rank, wide_a.data(), wide_b.data(), scaling};
    const auto floats = [](Matrix& m) { return reinterpret_cast<float*>(m.bytes.data()); };
    add_low_rank(w, x.dtype, x.bytes.data(), sizes.rows, y.bytes.data(), floats(t), executor);
    low_rank_backward(w, x.dtype, grad.bytes.data(), x.bytes.data(), floats(t), sizes.rows,
                      wants_x ? x_grad.bytes.data() : nullptr, floats(a_grad), floats(b_grad),
                      executor);
  }
};

double unit(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}

/// A float64 sum and the sum of its absolute terms.
struct Sum {
  double value = 0, size = 0;
  void add(double v) {
    value += v;
    size += std::abs(v);
  }
  void add(double v, double magnitude) {
    value += v;
    size += magnitude;
  }
};

/// float32 sums of `terms` products of sums: both orders are within this of the exact one.
double drift(double terms) { return (terms + 8) * 0x1p-23; }

void expect_close(double actual, const Sum& exact, double terms, double rounding,
                  const std::string& what) {
  const double allowed =
      exact.size * drift(terms) + (std::abs(exact.value) + exact.size * drift(terms)) * rounding;
  ASSERT_LE(std::abs(actual - exact.value), allowed + 1e-7) << what << " is " << actual;
}

void check_forward(const Change& c) {
  const Case& s = c.sizes;
  for (std::int64_t m = 0; m < s.rows; ++m) {
    std::vector<Sum> t(static_cast<std::size_t>(s.rank));
    for (std::int64_t r = 0; r < s.rank; ++r) {
      Sum& sum = t[static_cast<std::size_t>(r)];
      for (std::int64_t k = 0; k < s.in; ++k) {
        sum.add(static_cast<double>(c.scaling) * c.x.at(m, k) * c.a.at(r, k));
      }
      expect_close(c.t.at(m, r), sum, static_cast<double>(s.in), 0x1p-24, "t");
    }
    for (std::int64_t n = 0; n < s.out; ++n) {
      Sum sum;
      sum.add(c.y_before.at(m, n));
      for (std::int64_t r = 0; r < s.rank; ++r) {
        const Sum& of = t[static_cast<std::size_t>(r)];
        sum.add(of.value * c.b.at(n, r), of.size * std::abs(c.b.at(n, r)));
      }
      expect_close(c.y.at(m, n), sum, static_cast<double>(s.in + s.rank), unit(c.y.dtype), "y");
    }
  }
}

void check_backward(const Change& c, bool wants_x) {
  const Case& s = c.sizes;
  const auto terms = static_cast<double>(s.out + s.rank + s.rows);
  std::vector<Sum> d(static_cast<std::size_t>(s.rows * s.rank));
  for (std::int64_t m = 0; m < s.rows; ++m) {
    for (std::int64_t r = 0; r < s.rank; ++r) {
      for (std::int64_t n = 0; n < s.out; ++n) {
        d[static_cast<std::size_t>(m * s.rank + r)].add(static_cast<double>(c.scaling) *
                                                        c.grad.at(m, n) * c.b.at(n, r));
      }
    }
  }
  const auto of = [&](std::int64_t m, std::int64_t r) -> const Sum& {
    return d[static_cast<std::size_t>(m * s.rank + r)];
  };
  for (std::int64_t k = 0; k < s.in; ++k) {
    for (std::int64_t m = 0; m < s.rows; ++m) {
      Sum sum;
      sum.add(c.x_grad_before.at(m, k));
      for (std::int64_t r = 0; wants_x && r < s.rank; ++r) {
        sum.add(of(m, r).value * c.a.at(r, k), of(m, r).size * std::abs(c.a.at(r, k)));
      }
      expect_close(c.x_grad.at(m, k), sum, terms, wants_x ? unit(c.x.dtype) : 0, "x_grad");
    }
    for (std::int64_t r = 0; r < s.rank; ++r) {
      Sum sum;
      for (std::int64_t m = 0; m < s.rows; ++m) {
        sum.add(of(m, r).value * c.x.at(m, k), of(m, r).size * std::abs(c.x.at(m, k)));
      }
      expect_close(c.a_grad.at(r, k), sum, terms, 0x1p-24, "a_grad");
    }
  }
  for (std::int64_t n = 0; n < s.out; ++n) {
    for (std::int64_t r = 0; r < s.rank; ++r) {
      Sum sum;
      for (std::int64_t m = 0; m < s.rows; ++m) sum.add(c.grad.at(m, n) * c.t.at(m, r));
      expect_close(c.b_grad.at(n, r), sum, terms, 0x1p-24, "b_grad");
    }
  }
}

class LowRankTest : public testing::KernelSetTest {};

TEST_F(LowRankTest, ChangesAndGradients) {
  for (const std::string_view set : available_cpu_kernels()) {
    select_cpu_kernels(set);
    for (const Case& c : kCases) {
      for (const DType dtype : kTypes) {
        SCOPED_TRACE(std::string(set) + " " + std::string(dtype_name(dtype)) + " rows " +
                     std::to_string(c.rows) + " in " + std::to_string(c.in) + " out " +
                     std::to_string(c.out) + " rank " + std::to_string(c.rank));
        for (const bool wants_x : {true, false}) {
          Change change(c, dtype, 3);
          change.run(serial_executor(), wants_x);
          check_forward(change);
          check_backward(change, wants_x);
        }
      }
    }
  }
}

TEST_F(LowRankTest, BitsDoNotDependOnThreads) {
  for (const std::string_view set : available_cpu_kernels()) {
    select_cpu_kernels(set);
    const Case c{400, 300, 500, 16};
    Change one(c, DType::kBF16, 5), odd(c, DType::kBF16, 5), four(c, DType::kBF16, 5);
    one.run(serial_executor());
    odd.run(OddExecutor());
    four.run(ThreadExecutor());
    for (const Change* other : {&odd, &four}) {
      EXPECT_EQ(other->y.bytes, one.y.bytes) << set;
      EXPECT_EQ(other->t.bytes, one.t.bytes) << set;
      EXPECT_EQ(other->x_grad.bytes, one.x_grad.bytes) << set;
      EXPECT_EQ(other->a_grad.bytes, one.a_grad.bytes) << set;
      EXPECT_EQ(other->b_grad.bytes, one.b_grad.bytes) << set;
    }
  }
}

TEST(LowRankErrors, SizesAndTypes) {
  const auto message = [](const LowRank& w, DType dtype, std::int64_t rows) -> std::string {
    try {
      add_low_rank(w, dtype, nullptr, rows, nullptr, nullptr, serial_executor());
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message({.in = -1}, DType::kF32, 0), "low_rank: a size is -1, expected >= 0");
  EXPECT_EQ(message({}, DType::kF32, -3), "low_rank: a size is -3, expected >= 0");
  EXPECT_EQ(message({}, DType::kU8, 0), "low_rank: dtype is u8, expected f32, f16 or bf16");
  EXPECT_EQ(message({}, DType::kBF16, 0), "");
}

TEST(LowRankErrors, NoRowsGiveNoGradient) {
  Change change({0, 20, 30, 4}, DType::kBF16, 7);
  change.run(serial_executor());
  for (const Matrix* m : {&change.a_grad, &change.b_grad}) {
    for (const float v : m->floats()) ASSERT_EQ(v, 0.0F);
  }
}

}  // namespace
}  // namespace quantal

// Products of every kernel set: within the stated bound of the reference, and the same bits
// whatever the number of threads and the number of inputs. All sets give the same bits, but for
// bfloat16 activations where a set has instructions of their own.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ref/ref.h"
#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

class Products : public KernelSetTest {};

struct Problem {
  PackedMatrix w;
  std::int64_t m_rows;
  DType dtype;
  bool transposed;
  std::vector<std::uint8_t> x;  // of dtype
  std::vector<float> x32;       // the same values
  std::vector<float> bias;

  std::int64_t depth() const { return transposed ? w.spec.rows : w.spec.cols; }
  std::int64_t width() const { return transposed ? w.spec.cols : w.spec.rows; }
};

Problem make_problem(const PackedSpec& spec, std::int64_t m_rows, DType dtype, bool transposed,
                     std::uint64_t seed) {
  Problem p{random_packed(spec, seed), m_rows, dtype, transposed, {}, {}, {}};
  p.x32 = random_floats(m_rows * p.depth(), seed + 1);
  p.x = rounded_to(dtype, p.x32);
  p.bias = random_floats(spec.rows, seed + 2);
  return p;
}

std::vector<std::uint8_t> run(const Problem& p, const Executor& executor, std::int64_t m_begin = 0,
                              std::int64_t m_end = -1) {
  if (m_end < 0) m_end = p.m_rows;
  const auto element = dtype_size(p.dtype);
  std::vector<std::uint8_t> y(static_cast<std::size_t>((m_end - m_begin) * p.width()) * element);
  const std::uint8_t* x = p.x.data() + static_cast<std::size_t>(m_begin * p.depth()) * element;
  if (p.transposed) {
    matmul_transposed(p.w.view(), p.dtype, x, m_end - m_begin, y.data(), executor);
  } else {
    matmul(p.w.view(), p.dtype, x, m_end - m_begin, p.bias.data(), y.data(), executor);
  }
  return y;
}

/// Inputs up to which scales may be applied to sums (quantal/kernels.h).
constexpr std::int64_t kMostSumInputs = 64;

/// True if the active set multiplies bfloat16 with bfloat16, with an order of its own.
bool has_own_order(const Problem& p) {
  return p.dtype == DType::kBF16 && active_cpu_kernels().starts_with("avx512") &&
         active_cpu_kernels() != "avx512";
}

/// The same matrix with values that bfloat16 holds: products of bfloat16 are exact for it.
PackedMatrix rounded_to_bf16(const PackedMatrix& w) {
  // One group per column: code 1, whose scale is the value.
  const PackedSpec spec{.rows = w.spec.rows,
                        .cols = w.spec.cols,
                        .bits = 8,
                        .scale = ScaleSource::kBF16,
                        .value_dtype = DType::kBF16,
                        .group_size = 1};
  PackedMatrix out = make_packed(spec);
  std::vector<std::uint8_t> values(static_cast<std::size_t>(spec.rows * spec.cols) * 2);
  ref::dequantize(w.view(), {0, spec.rows, 0, spec.cols}, DType::kBF16, values.data(), spec.cols);
  const std::vector<std::uint8_t> ones(static_cast<std::size_t>(spec.cols), 1);
  const PackedLayout layout = layout_of(spec);
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    pack_row(8, ones.data(), spec.cols, out.codes.data() + r * layout.code_bytes);
  }
  spread_stats(spec, {.scales = values.data()}, 0, out.stats.data(), serial_executor());
  return out;
}

/// Exact outputs and the size of their terms.
struct Expected {
  std::vector<double> y, magnitude;
  explicit Expected(std::size_t n) : y(n), magnitude(n) {}
};

Expected expected(const Problem& p) {
  const PackedMatrix w = has_own_order(p) ? rounded_to_bf16(p.w) : p.w;
  Expected e(static_cast<std::size_t>(p.m_rows * p.width()));
  if (p.transposed) {
    ref::matmul_transposed(w.view(), p.x32.data(), p.m_rows, e.y.data(), e.magnitude.data());
  } else {
    ref::matmul(w.view(), p.x32.data(), p.m_rows, p.bias.data(), e.y.data(), e.magnitude.data());
  }
  return e;
}

/// The first output outside of the stated bound; that of `e` if there is none.
std::size_t first_outside(const Problem& p, const std::vector<float>& got, const Expected& e) {
  const double rounding = p.dtype == DType::kF32   ? 0x1p-24
                          : p.dtype == DType::kF16 ? 0x1p-11
                                                   : 0x1p-8;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double bound = 8 * std::sqrt(static_cast<double>(p.depth())) * 0x1p-24 * e.magnitude[i] +
                         rounding * std::fabs(e.y[i]) + 0x1p-24;
    if (!(std::fabs(got[i] - e.y[i]) <= bound)) return i;
  }
  return got.size();
}

/// Products of few bfloat16 inputs may apply scales to sums of levels: all outputs or none.
void expect_close(const Problem& p, const std::vector<std::uint8_t>& y, const std::string& what) {
  const auto n = static_cast<std::size_t>(p.m_rows * p.width());
  std::vector<float> got(n);
  widen_to_f32(p.dtype, y.data(), static_cast<std::int64_t>(n), got.data());
  const Expected e = expected(p);
  const std::size_t outside = first_outside(p, got, e);
  if (outside == n) return;
  if (has_own_order(p) && !p.transposed && p.m_rows <= kMostSumInputs) {
    Expected of_levels(n);
    ref::matmul_of_levels(p.w.view(), p.x32.data(), p.m_rows, p.bias.data(), of_levels.y.data(),
                          of_levels.magnitude.data());
    const std::size_t i = first_outside(p, got, of_levels);
    ASSERT_EQ(i, n) << what << " output " << i << ": " << got[i] << ", expected " << of_levels.y[i]
                    << " or, of rounded weights, " << e.y[i];
    return;
  }
  FAIL() << what << " output " << outside << ": " << got[outside] << ", expected " << e.y[outside];
}

void check_all_sets(const Problem& p, const std::string& what) {
  std::vector<std::uint8_t> common;
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    const auto y = run(p, serial_executor());
    if (has_own_order(p)) {
      expect_close(p, y, std::string(name) + " " + what);
    } else if (common.empty()) {
      common = y;
      expect_close(p, y, std::string(name) + " " + what);
    } else {
      EXPECT_EQ(y, common) << name << " differs from the other sets: " << what;
    }
    EXPECT_EQ(run(p, OddExecutor()), y) << name << " oddly split: " << what;
    EXPECT_EQ(run(p, ThreadExecutor()), y) << name << " threads: " << what;
  }
}

TEST_F(Products, EverySpecOneAndThreeInputs) {
  std::uint64_t seed = 1000;
  for (bool transposed : {false, true}) {
    for (const PackedSpec& spec : kernel_specs()) {
      if (!supports_packed_matmul(spec)) continue;
      for (std::int64_t m : {1, 3}) {
        const Problem p = make_problem(spec, m, DType::kF32, transposed, ++seed);
        check_all_sets(p, describe(spec) + " m " + std::to_string(m) + " transposed " +
                              std::to_string(transposed) + " seed " + std::to_string(seed));
      }
    }
  }
}

TEST_F(Products, ManyInputsAndEveryActivationType) {
  const PackedSpec specs[] = {
      {.rows = 37, .cols = 576, .bits = 8, .offset = Offset::kZeroPoint, .group_size = 128},
      {.rows = 70, .cols = 192, .code_map = CodeMap::kNf4, .scale = ScaleSource::kNestedU8},
      {.rows = 33, .cols = 130, .offset = Offset::kBias, .group_size = 32},
      {.rows = 150, .cols = 64, .bits = 8, .centre = 128, .scale = ScaleSource::kF16}};
  std::uint64_t seed = 5000;
  for (const PackedSpec& spec : specs) {
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (std::int64_t m : {0, 2, 4, 7, 16, 17, 33}) {
        for (bool transposed : {false, true}) {
          const Problem p = make_problem(spec, m, dtype, transposed, ++seed);
          check_all_sets(
              p, describe(spec) + " m " + std::to_string(m) + " seed " + std::to_string(seed));
        }
      }
    }
  }
}

/// quantal/kernels.h states when: bfloat16 activations, integers and tables, whole groups.
bool applies_scales_to_sums(const PackedSpec& spec, std::int64_t m_rows, bool transposed) {
  const bool own_order =
      active_cpu_kernels().starts_with("avx512") && active_cpu_kernels() != "avx512";
  return own_order && !transposed && m_rows <= kMostSumInputs && spec.bits > 1 &&
         spec.cols % 16 == 0 && spec.group_size % 16 == 0 && spec.cols % spec.group_size == 0 &&
         spec.code_map < CodeMap::kE4M3 && (spec.bits <= 4 || spec.centre >= 0);
}

/// level * scale and then + offset in float32, in the end rounded to bfloat16.
std::vector<float> weights_of_levels(const PackedMatrix& w) {
  std::vector<float> out;
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    for (std::int64_t c = 0; c < w.spec.cols; ++c) {
      const ref::Parts p = ref::parts(w.view(), r, c);
      const float scaled = bf16_to_f32(f32_to_bf16(p.level)) * static_cast<float>(p.scale);
      out.push_back(bf16_to_f32(f32_to_bf16(scaled + static_cast<float>(p.offset))));
    }
  }
  return out;
}

/// Unit vectors pick columns: outputs are the weights themselves, rounded to bfloat16.
void check_unit_vectors(const PackedSpec& spec, std::int64_t m_rows, bool transposed,
                        std::uint64_t seed) {
  const PackedMatrix w = random_packed(spec, seed);
  const std::int64_t depth = transposed ? spec.rows : spec.cols;
  const std::int64_t width = transposed ? spec.cols : spec.rows;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(spec.rows * spec.cols) * 2);
  ref::dequantize(w.view(), {0, spec.rows, 0, spec.cols}, DType::kBF16, bytes.data(), spec.cols);
  std::vector<float> weights(bytes.size() / 2), y(static_cast<std::size_t>(m_rows * width));
  widen_to_f32(DType::kBF16, bytes.data(), spec.rows * spec.cols, weights.data());
  const std::vector<float> unrounded = weights_of_levels(w);
  std::vector<std::uint16_t> x(static_cast<std::size_t>(m_rows * depth)), out(y.size());
  for (std::int64_t begin = 0; begin < depth; begin += m_rows) {
    std::fill(x.begin(), x.end(), std::uint16_t{0});
    const std::int64_t m = std::min(m_rows, depth - begin);
    for (std::int64_t i = 0; i < m; ++i) {
      x[static_cast<std::size_t>(i * depth + begin + i)] = f32_to_bf16(1.0F);
    }
    if (transposed) {
      matmul_transposed(w.view(), DType::kBF16, x.data(), m, out.data(), serial_executor());
    } else {
      matmul(w.view(), DType::kBF16, x.data(), m, nullptr, out.data(), serial_executor());
    }
    widen_to_f32(DType::kBF16, out.data(), m * width, y.data());
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t n = 0; n < width; ++n) {
        const std::int64_t r = transposed ? begin + i : n;
        const std::int64_t c = transposed ? n : begin + i;
        const auto& of = applies_scales_to_sums(spec, m, transposed) ? unrounded : weights;
        ASSERT_EQ(y[static_cast<std::size_t>(i * width + n)],
                  of[static_cast<std::size_t>(r * spec.cols + c)])
            << active_cpu_kernels() << " " << describe(spec) << " row " << r << " column " << c
            << " of " << m_rows << " inputs, seed " << seed;
      }
    }
  }
}

TEST_F(Products, UnitVectorsGiveTheWeights) {
  std::uint64_t seed = 40000;
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    for (const PackedSpec& spec : kernel_specs()) {
      // The other sets have the bits of each other and one order; short rows reach all their codes.
      const bool own_order = name.starts_with("avx512") && name != "avx512";
      if (!supports_packed_matmul(spec) || spec.cols > (own_order ? 600 : 64)) continue;
      // Few inputs, a tile, panels: each its own kernel in the set for bfloat16.
      for (std::int64_t m : {1, 2, 3, 4, 9, 20, 40}) check_unit_vectors(spec, m, false, ++seed);
      check_unit_vectors(spec, 5, true, ++seed);
    }
  }
}

TEST_F(Products, EverySpecInBfloat16) {
  std::uint64_t seed = 9000;
  for (bool transposed : {false, true}) {
    for (const PackedSpec& spec : kernel_specs()) {
      if (!supports_packed_matmul(spec)) continue;
      const std::int64_t m = 1 + static_cast<std::int64_t>(++seed % 6);
      const Problem p = make_problem(spec, m, DType::kBF16, transposed, seed);
      check_all_sets(p, describe(spec) + " m " + std::to_string(m) + " transposed " +
                            std::to_string(transposed) + " seed " + std::to_string(seed));
    }
  }
}

TEST_F(Products, LongRowsManyInputsInBfloat16) {
  std::uint64_t seed = 20000;
  for (const PackedSpec& spec :
       {PackedSpec{.rows = 21, .cols = 8704, .code_map = CodeMap::kNf4},
        PackedSpec{.rows = 13, .cols = 4512, .group_size = 32},
        PackedSpec{.rows = 9, .cols = 4160, .offset = Offset::kBias, .group_size = 32},
        PackedSpec{.rows = 10, .cols = 8192, .group_size = 4096},
        PackedSpec{.rows = 9, .cols = 8064, .offset = Offset::kZeroPoint, .group_size = 192},
        PackedSpec{.rows = 9, .cols = 4800, .bits = 8, .offset = Offset::kBias, .group_size = 96},
        PackedSpec{.rows = 9, .cols = 4352, .bits = 2, .offset = Offset::kShift, .group_size = 128},
        PackedSpec{.rows = 11, .cols = 4608, .bits = 5, .offset = Offset::kShift, .group_size = 32},
        PackedSpec{.rows = 9, .cols = 4864, .bits = 5, .offset = Offset::kBias, .group_size = 64},
        PackedSpec{.rows = 9, .cols = 8448, .bits = 6, .centre = 32, .group_size = 192},
        PackedSpec{.rows = 10, .cols = 4352, .bits = 6, .centre = 32, .group_size = 16},
        PackedSpec{.rows = 11, .cols = 5000, .bits = 8, .centre = 128}}) {
    for (std::int64_t m : {1, 2, 3, 4, 5, 8, 11, 12, 16, 33, 67, 530}) {
      const Problem p = make_problem(spec, m, DType::kBF16, false, ++seed);
      check_all_sets(p, describe(spec) + " m " + std::to_string(m));
    }
  }
}

TEST_F(Products, HalfStepsAtTheEndOfRowsInBfloat16) {
  // Widths of 2, 3 and 5 bits go by 128 columns, 4 and 6 bits by 64.
  std::uint64_t seed = 30000;
  for (int bits : {2, 3, 4, 5, 6}) {
    const std::int64_t half = bits == 4 || bits == 6 ? 32 : 64;
    for (std::int64_t halves : {1, 3, 9, 17, 67}) {
      for (std::int64_t group : {std::int64_t{16}, std::int64_t{32}, half, 3 * half / 2}) {
        if (half * halves % group != 0) continue;
        const PackedSpec spec{.rows = 7,
                              .cols = half * halves,
                              .bits = bits,
                              .centre = 2,
                              .offset = static_cast<Offset>(seed % 4),
                              .group_size = group};
        for (std::int64_t m : {1, 4, 7, 16, 35}) {
          for (bool transposed : {false, true}) {
            const Problem p = make_problem(spec, m, DType::kBF16, transposed, ++seed);
            check_all_sets(p, describe(spec) + " m " + std::to_string(m) + " transposed " +
                                  std::to_string(transposed) + " seed " + std::to_string(seed));
          }
        }
      }
    }
  }
}

TEST_F(Products, ARowOfOutputsDoesNotDependOnTheOtherInputs) {
  const PackedSpec specs[] = {{.rows = 21, .cols = 256, .code_map = CodeMap::kNf4},
                              {.rows = 9, .cols = 4224, .group_size = 32},
                              {.rows = 9, .cols = 4800, .group_size = 192},
                              {.rows = 13, .cols = 4352, .bits = 8, .group_size = 64},
                              {.rows = 9, .cols = 4352, .bits = 5, .group_size = 32},
                              {.rows = 9, .cols = 4224, .bits = 6, .group_size = 64},
                              {.rows = 9, .cols = 4160, .bits = 2, .group_size = 64},
                              {.rows = 9, .cols = 576, .bits = 3, .group_size = 96},
                              {.rows = 9, .cols = 1088, .bits = 5, .group_size = 32},
                              {.rows = 21, .cols = 200, .bits = 8, .offset = Offset::kShift}};
  for (const PackedSpec& spec : specs) {
    for (int i = 0; i < 4; ++i) {
      const bool transposed = i % 2 == 1;
      const DType dtype = i < 2 ? DType::kF32 : DType::kBF16;
      const Problem p = make_problem(spec, 19, dtype, transposed, 77);
      const auto all = run(p, serial_executor());
      std::vector<std::uint8_t> single;  // few inputs of bfloat16 have bits of their own
      for (std::int64_t m = 0; m < p.m_rows; ++m) {
        const auto one = run(p, serial_executor(), m, m + 1);
        single.insert(single.end(), one.begin(), one.end());
      }
      if (!has_own_order(p) || transposed) EXPECT_EQ(single, all) << describe(spec);
      const auto bytes = static_cast<std::ptrdiff_t>(all.size()) / p.m_rows;
      for (std::int64_t m = 0; m < p.m_rows; ++m) {
        for (std::int64_t count : {2, 3, 4, 5, 9, 12}) {
          if (m + count > p.m_rows) continue;
          const auto some = run(p, serial_executor(), m, m + count);
          const auto& whole = count <= kMostSumInputs ? single : all;
          EXPECT_TRUE(std::equal(some.begin(), some.end(), whole.begin() + m * bytes))
              << describe(spec) << " inputs " << m << " to " << m + count;
        }
      }
    }
  }
}

TEST_F(Products, LongSumsStayWithinTheBound) {
  // Equal terms make every rounding error point the same way: the worst case of a long sum.
  for (bool transposed : {false, true}) {
    const PackedSpec spec = transposed
                                ? PackedSpec{.rows = 40000, .cols = 32, .code_map = CodeMap::kNf4}
                                : PackedSpec{.rows = 4, .cols = 200000, .code_map = CodeMap::kNf4};
    Problem p = make_problem(spec, 1, DType::kF32, transposed, 9);
    std::fill(p.w.codes.begin(), p.w.codes.end(), std::uint8_t{0xEE});
    std::fill(p.x32.begin(), p.x32.end(), 0.1F);
    std::memcpy(p.x.data(), p.x32.data(), p.x.size());
    check_all_sets(p, describe(spec));
  }
}

TEST_F(Products, PaddingCodesNeverTurnAnInfiniteScaleIntoNan) {
  // 40 columns of 48 in the last strip; the scale of the group that padding falls into is infinite.
  for (int bits : {4, 8}) {
    const PackedSpec spec{.rows = 5, .cols = 40, .bits = bits, .centre = 0, .group_size = 64};
    PackedMatrix w = random_packed(spec, 3);
    const float infinity = INFINITY;
    const PackedLayout layout = layout_of(spec);
    ASSERT_TRUE(layout.has_header);
    for (std::int64_t r = 0; r < spec.rows; ++r) {  // every scale of every row
      for (std::int64_t k = 0; k < layout.slots; ++k) {
        std::memcpy(w.stats.data() + r * layout.stat_bytes + 4 + 4 * k, &infinity, 4);
      }
    }
    std::vector<std::uint8_t> ones(40, 1);
    for (std::int64_t r = 0; r < spec.rows; ++r) {
      pack_row(bits, ones.data(), 40, w.codes.data() + r * layout.code_bytes);
    }
    const std::vector<float> x(40 * 3, 0.5F), g(5, 0.5F);
    for (std::string_view name : available_cpu_kernels()) {
      select_cpu_kernels(name);
      for (std::int64_t m : {1, 3}) {
        std::vector<float> y(static_cast<std::size_t>(m * 5));
        matmul(w.view(), DType::kF32, x.data(), m, nullptr, y.data(), serial_executor());
        for (float v : y) EXPECT_EQ(v, INFINITY) << name;
      }
      std::vector<float> back(40);
      matmul_transposed(w.view(), DType::kF32, g.data(), 1, back.data(), serial_executor());
      for (float v : back) EXPECT_EQ(v, INFINITY) << name;
    }
  }
}

TEST_F(Products, MisalignedBuffersAreFine) {
  const PackedSpec spec{.rows = 6, .cols = 64, .offset = Offset::kZeroPoint, .group_size = 32};
  const Problem p = make_problem(spec, 2, DType::kF32, false, 11);
  std::vector<std::uint8_t> codes(p.w.codes.size() + 1), stats(p.w.stats.size() + 3);
  std::copy(p.w.codes.begin(), p.w.codes.end(), codes.begin() + 1);
  std::copy(p.w.stats.begin(), p.w.stats.end(), stats.begin() + 3);
  const PackedView moved{spec, std::span(codes).subspan(1), std::span(stats).subspan(3),
                         p.w.shared};
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    std::vector<std::uint8_t> y(p.w.spec.rows * 2 * 4);
    matmul(moved, DType::kF32, p.x.data(), 2, p.bias.data(), y.data(), serial_executor());
    EXPECT_EQ(y, run(p, serial_executor())) << name;
  }
}

TEST_F(Products, RefuseWhatTheyCannotDo) {
  const PackedMatrix columns =
      make_packed({.rows = 4, .cols = 64, .group_map = GroupMap::kColumnRuns, .group_size = 64});
  const PackedMatrix rows = make_packed({.rows = 4, .cols = 64});
  float x[64] = {}, y[64];
  EXPECT_FALSE(supports_packed_matmul(columns.spec));
  EXPECT_EQ(packed_matmul_max_rows(columns.spec, DType::kF32), 0);
  EXPECT_GT(packed_matmul_max_rows(rows.spec, DType::kF32), 0);
  EXPECT_THROW(matmul(columns.view(), DType::kF32, x, 1, nullptr, y, serial_executor()), Error);
  EXPECT_THROW(matmul(rows.view(), DType::kF64, x, 1, nullptr, y, serial_executor()), Error);
  EXPECT_THROW(matmul(rows.view(), DType::kF32, x, -1, nullptr, y, serial_executor()), Error);
  EXPECT_THROW(matmul_transposed(columns.view(), DType::kF32, x, 1, y, serial_executor()), Error);
  EXPECT_THROW(select_cpu_kernels("sse9"), Error);
}

}  // namespace
}  // namespace quantal::testing

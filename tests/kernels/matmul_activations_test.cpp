// Products with int8 activations: the formula of quantal/kernels.h computed one element at a time
// in float64, the same bits from every kernel set, and the stated distance from the exact product.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/activations.h"
#include "kernels/ref/ref.h"
#include "kernels/specs.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

class Int8Activations : public KernelSetTest {};

struct Problem {
  PackedMatrix w;
  std::int64_t m_rows;
  DType dtype;
  std::vector<std::uint8_t> x;  // of dtype
  std::vector<float> x32;       // the same values
  std::vector<float> bias;
};

Problem make_problem(const PackedSpec& spec, std::int64_t m_rows, DType dtype, std::uint64_t seed) {
  Problem p{random_packed(spec, seed), m_rows, dtype, {}, {}, {}};
  p.x32 = random_floats(m_rows * spec.cols, seed + 1);
  for (std::size_t i = 0; i < p.x32.size(); i += 37) p.x32[i] *= 20.0F;  // outliers
  p.x = rounded_to(dtype, p.x32);
  p.bias = random_floats(spec.rows, seed + 2);
  return p;
}

std::vector<std::uint8_t> run(const Problem& p, const Executor& executor, std::int64_t m_begin = 0,
                              std::int64_t m_end = -1) {
  if (m_end < 0) m_end = p.m_rows;
  const auto element = dtype_size(p.dtype);
  std::vector<std::uint8_t> y(static_cast<std::size_t>((m_end - m_begin) * p.w.spec.rows) *
                              element);
  const std::uint8_t* x = p.x.data() + static_cast<std::size_t>(m_begin * p.w.spec.cols) * element;
  matmul_int8_activations(p.w.view(), p.dtype, x, m_end - m_begin, p.bias.data(), y.data(),
                          executor);
  return y;
}

std::int64_t run_columns(const PackedSpec& spec) {
  if (spec.group_size == spec.cols) return 128;
  std::int64_t run = 128;
  while (spec.group_size % run != 0) run /= 2;
  return run;
}

/// x as the products see it: rounded to multiples of max / 127 in each run.
std::vector<double> rounded_inputs(const Problem& p) {
  const std::int64_t cols = p.w.spec.cols, run = run_columns(p.w.spec);
  std::vector<double> out(p.x32.size());
  for (std::int64_t m = 0; m < p.m_rows; ++m) {
    for (std::int64_t begin = 0; begin < cols; begin += run) {
      const std::int64_t end = std::min(cols, begin + run);
      float most = 0;
      for (std::int64_t k = begin; k < end; ++k) {
        most = std::max(most, std::fabs(p.x32[static_cast<std::size_t>(m * cols + k)]));
      }
      if (most < 0x1p-120F) continue;
      for (std::int64_t k = begin; k < end; ++k) {
        const auto i = static_cast<std::size_t>(m * cols + k);
        out[i] = std::nearbyint(p.x32[i] * (127.0F / most)) * static_cast<double>(most / 127.0F);
      }
    }
  }
  return out;
}

/// The same matrix with one code in all places.
PackedMatrix filled(const PackedMatrix& w, std::uint8_t code) {
  PackedMatrix out = w;
  const std::vector<std::uint8_t> codes(static_cast<std::size_t>(w.spec.cols), code);
  for (std::int64_t r = 0; r < w.spec.rows; ++r) {
    pack_row(w.spec.bits, codes.data(), w.spec.cols,
             out.codes.data() + r * layout_of(w.spec).code_bytes);
  }
  return out;
}

/// Unrounded weights of the integer form: of tables the rounded levels.
std::vector<double> integer_weights(const PackedMatrix& w) {
  PackedMatrix wide = w;  // steps of a value are rounded to float32 at most
  wide.spec.value_dtype = DType::kF32;
  const PackedSpec& s = w.spec;
  std::vector<double> out(static_cast<std::size_t>(s.rows * s.cols));
  double largest = 0;
  const std::array<float, 16>* table = s.code_map == CodeMap::kNf4     ? &kNf4Codebook
                                       : s.code_map == CodeMap::kFp4   ? &kFp4Codebook
                                       : s.code_map == CodeMap::kE2M1  ? &kE2M1Codebook
                                       : s.code_map == CodeMap::kIq4Nl ? &kIq4NlCodebook
                                                                       : nullptr;
  std::array<float, 16> own{};
  if (s.code_map == CodeMap::kTable) {
    std::memcpy(own.data(), w.shared.data(), sizeof(own));
    table = &own;
  }
  if (table != nullptr) {
    for (float v : *table) largest = std::max(largest, std::fabs(static_cast<double>(v)));
  }
  const bool rounds =
      s.code_map == CodeMap::kNf4 || s.code_map == CodeMap::kFp4 || s.code_map == CodeMap::kTable;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(s.cols));
  const PackedMatrix low = filled(wide, 0), high = filled(wide, 1);
  for (std::int64_t r = 0; r < s.rows; ++r) {
    unpack_row(s.bits, w.codes.data() + r * layout_of(s).code_bytes, s.cols, codes.data());
    for (std::int64_t c = 0; c < s.cols; ++c) {
      double v = static_cast<double>(ref::value(wide.view(), r, c));
      if (rounds) {
        const double level = (*table)[codes[static_cast<std::size_t>(c)]];
        const double scale = (static_cast<double>(ref::value(high.view(), r, c)) -
                              static_cast<double>(ref::value(low.view(), r, c))) /
                             ((*table)[1] - (*table)[0]);
        v += scale * (std::nearbyint(level * 127 / largest) * largest / 127 - level);
      }
      out[static_cast<std::size_t>(r * s.cols + c)] = v;
    }
  }
  return out;
}

void expect_formula(const Problem& p, const std::vector<std::uint8_t>& y, const std::string& what) {
  const std::vector<double> x = rounded_inputs(p), w = integer_weights(p.w);
  const std::int64_t rows = p.w.spec.rows, cols = p.w.spec.cols;
  std::vector<float> got(static_cast<std::size_t>(p.m_rows * rows));
  widen_to_f32(p.dtype, y.data(), p.m_rows * rows, got.data());
  const double rounding = p.dtype == DType::kF32   ? 0x1p-23
                          : p.dtype == DType::kF16 ? 0x1p-10
                                                   : 0x1p-7;
  // Code and offset terms of a group cancel: their size is that of the codes.
  const double codes = std::ldexp(1.0, p.w.spec.bits + 1);
  const bool table = p.w.spec.code_map != CodeMap::kInteger;
  for (std::int64_t m = 0; m < p.m_rows; ++m) {
    for (std::int64_t n = 0; n < rows; ++n) {
      double sum = p.bias[static_cast<std::size_t>(n)], size = std::fabs(sum), most = 0, in = 0;
      for (std::int64_t k = 0; k < cols; ++k) {
        const double a = x[static_cast<std::size_t>(m * cols + k)];
        const double b = w[static_cast<std::size_t>(n * cols + k)];
        sum += a * b;
        size += std::fabs(a * b);
        most = std::max(most, std::fabs(b));
        in += std::fabs(a);
      }
      const double scale = table ? most : most * codes;
      const double bound = 0x1p-23 * (size + scale * in) * std::sqrt(static_cast<double>(cols)) +
                           rounding * std::fabs(sum) + 1e-7;
      ASSERT_LE(std::fabs(got[static_cast<std::size_t>(m * rows + n)] - sum), bound)
          << what << " m " << m << " n " << n;
    }
  }
}

void check_all_sets(const Problem& p, const std::string& what) {
  std::vector<std::uint8_t> common;
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    const auto y = run(p, serial_executor());
    if (common.empty()) expect_formula(p, common = y, std::string(name) + " " + what);
    EXPECT_EQ(y, common) << name << " differs from the other sets: " << what;
    EXPECT_EQ(run(p, OddExecutor()), y) << name << " oddly split: " << what;
    EXPECT_EQ(run(p, ThreadExecutor()), y) << name << " threads: " << what;
  }
}

TEST_F(Int8Activations, EverySpecOneAndThreeInputs) {
  std::uint64_t seed = 1;
  std::int64_t taken = 0;
  for (const PackedSpec& spec : kernel_specs()) {
    if (!int8_activations_refusal(spec).empty()) continue;
    ++taken;
    for (std::int64_t m : {1, 3}) {
      const Problem p = make_problem(spec, m, DType::kF32, ++seed);
      check_all_sets(p,
                     describe(spec) + " m " + std::to_string(m) + " seed " + std::to_string(seed));
    }
  }
  EXPECT_GT(taken, 300);
}

TEST_F(Int8Activations, ShapesGroupsAndInputs) {
  std::uint64_t seed = 5000;
  for (std::int64_t group : {16, 32, 48, 64, 128, 192, 4096}) {
    for (std::int64_t rows : {1, 31, 33, 70}) {
      for (const auto& [bits, offset] :
           {std::pair{4, Offset::kZeroPoint}, std::pair{4, Offset::kNone},
            std::pair{8, Offset::kNone}}) {
        const std::int64_t groups = group == 4096 ? 2 : 1 + static_cast<std::int64_t>(seed % 9);
        const PackedSpec spec{.rows = rows,
                              .cols = groups * group,
                              .bits = bits,
                              .centre = offset == Offset::kNone ? 1 << (bits - 1) : 0,
                              .offset = offset,
                              .scale = ScaleSource::kF16,
                              .group_size = group};
        for (std::int64_t m : {1, 2, 3, 5, 12, 13, 16, 33}) {
          if (m > 5 && (rows == 31 || group == 4096)) continue;
          const DType dtype = m % 2 == 0 ? DType::kF16 : DType::kBF16;
          const Problem p = make_problem(spec, m, dtype, ++seed);
          check_all_sets(p, describe(spec) + " m " + std::to_string(m));
        }
      }
    }
  }
}

/// Rows whose sub-codes and super-blocks fill 32-bit words are transposed as they are stored.
TEST_F(Int8Activations, SuperBlocksInWholeWords) {
  std::uint64_t seed = 8000;
  for (ScaleSource scale : {ScaleSource::kSuperU8, ScaleSource::kSuperI8, ScaleSource::kSuperU4}) {
    for (Offset offset : {Offset::kNone, Offset::kShift}) {
      if (scale == ScaleSource::kSuperU4 && offset == Offset::kNone) continue;
      if (scale == ScaleSource::kSuperI8 && offset != Offset::kNone) continue;
      for (std::int64_t nested : {4, 8, 16}) {
        for (std::int64_t supers : {1, 2, 10, 34}) {
          const std::int64_t group = scale == ScaleSource::kSuperU8 ? 32 : 16;
          const PackedSpec spec{.rows = 35,
                                .cols = supers * nested * group,
                                .bits = scale == ScaleSource::kSuperI8 ? 6 : 4,
                                .offset = offset,
                                .scale = scale,
                                .group_size = group,
                                .nested_group_size = nested};
          for (std::int64_t m : {1, 3}) {
            const Problem p = make_problem(spec, m, DType::kBF16, ++seed);
            check_all_sets(p, describe(spec) + " m " + std::to_string(m));
          }
        }
      }
    }
  }
}

TEST_F(Int8Activations, WholeRowsOfAnyLength) {
  std::uint64_t seed = 9000;
  for (std::int64_t cols : {1, 3, 4, 15, 17, 63, 65, 127, 129, 511, 513, 700, 4100}) {
    for (int bits : {2, 4, 8}) {
      const PackedSpec spec{
          .rows = 5, .cols = cols, .bits = bits, .centre = 1 << (bits - 1), .group_size = cols};
      check_all_sets(make_problem(spec, 3, DType::kBF16, ++seed), describe(spec));
    }
  }
}

TEST_F(Int8Activations, RowsDoNotDependOnTheirNumber) {
  const PackedSpec spec{.rows = 40, .cols = 576, .offset = Offset::kBias, .group_size = 64};
  const Problem p = make_problem(spec, 600, DType::kBF16, 77);  // more than one block
  for (std::string_view name : available_cpu_kernels()) {
    if (name == "scalar") continue;
    select_cpu_kernels(name);
    const auto all = run(p, ThreadExecutor());
    for (const auto& [begin, end] : {std::pair{0, 1}, std::pair{299, 303}, std::pair{587, 600}}) {
      const auto part = run(p, serial_executor(), begin, end);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + begin * spec.rows * 2))
          << name << " rows " << begin;
    }
  }
}

/// Sets that this machine runs but would not choose.
TEST_F(Int8Activations, VariantsThatAreNotChosenHaveTheSameBits) {
  struct Variant {
    const char* set;
    const IntKernels& (*kernels)();
  };
  std::vector<Variant> variants;
#if defined(__x86_64__)
  for (std::string_view name : available_cpu_kernels()) {
    if (name == "avx512") variants.push_back({"avx512", int_kernels_avx512});
    if (name == "avx2") variants.push_back({"avx2", int_kernels_avx2});
  }
#elif defined(__aarch64__)
  variants.push_back({"neon", int_kernels_neon});
#endif
  for (const Variant& v : variants) {
    for (const PackedSpec& spec :
         {PackedSpec{.rows = 40, .cols = 640, .offset = Offset::kZeroPoint, .group_size = 32},
          PackedSpec{.rows = 40, .cols = 640, .code_map = CodeMap::kNf4},
          PackedSpec{.rows = 40, .cols = 640, .bits = 8, .centre = 128, .group_size = 640}}) {
      const Problem p = make_problem(spec, 7, DType::kBF16, 3);
      select_cpu_kernels("scalar");
      const auto expected = run(p, serial_executor());
      std::vector<std::uint8_t> y(expected.size());
      matmul_int8_activations(v.kernels(), p.w.view(), p.dtype, p.x.data(), p.m_rows, p.bias.data(),
                              y.data(), serial_executor());
      EXPECT_EQ(y, expected) << v.set << " " << describe(spec);
    }
  }
}

TEST_F(Int8Activations, ExtremeCodesDoNotSaturate) {
  PackedSpec spec{.rows = 33, .cols = 512, .bits = 8, .centre = 128, .group_size = 128};
  for (const auto& [code, input] : {std::pair{255, 1.0F}, std::pair{0, -1.0F}, {0, 1.0F}}) {
    Problem p = make_problem(spec, 2, DType::kF32, 5);
    std::ranges::fill(p.w.codes, static_cast<std::uint8_t>(code));
    std::ranges::fill(p.x32, input);
    std::memcpy(p.x.data(), p.x32.data(), p.x.size());
    check_all_sets(p, "code " + std::to_string(code));
  }
}

TEST_F(Int8Activations, InfinityAndNanMakeTheirRowNan) {
  const PackedSpec spec{.rows = 35, .cols = 192, .group_size = 64};
  for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                    std::nanf("")}) {
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      Problem p = make_problem(spec, 3, dtype, 8);
      p.x32[192 + 100] = bad;
      narrow_from_f32(dtype, p.x32.data(), 3 * 192, p.x.data());
      for (std::string_view name : available_cpu_kernels()) {
        select_cpu_kernels(name);
        const auto y = run(p, serial_executor());
        std::vector<float> got(3 * 35);
        widen_to_f32(dtype, y.data(), 3 * 35, got.data());
        for (std::size_t i = 0; i < got.size(); ++i) {
          EXPECT_EQ(std::isnan(got[i]), i / 35 == 1) << name << " output " << i;
        }
      }
    }
  }
}

TEST_F(Int8Activations, ZerosAndTinyActivations) {
  const PackedSpec spec{.rows = 5, .cols = 128, .group_size = 64};
  Problem p = make_problem(spec, 2, DType::kF32, 8);
  std::ranges::fill(p.x32, 0.0F);
  for (std::size_t i = 128; i < 256; ++i) p.x32[i] = 1e-39F;
  std::memcpy(p.x.data(), p.x32.data(), p.x.size());
  for (std::string_view name : available_cpu_kernels()) {
    select_cpu_kernels(name);
    const auto y = run(p, serial_executor());
    std::vector<float> got(10);
    std::memcpy(got.data(), y.data(), y.size());
    for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(got[i], p.bias[i % 5]) << name;
  }
}

/// The bound of quantal/kernels.h against the exact product.
TEST_F(Int8Activations, StaysWithinTheStatedBound) {
  for (const PackedSpec& spec :
       {PackedSpec{.rows = 16, .cols = 1024, .offset = Offset::kZeroPoint, .group_size = 64},
        PackedSpec{.rows = 16, .cols = 1024, .centre = 8, .group_size = 32},
        PackedSpec{.rows = 16, .cols = 1024, .code_map = CodeMap::kNf4, .group_size = 64},
        PackedSpec{.rows = 16, .cols = 1000, .bits = 8, .centre = 128, .group_size = 1000}}) {
    const Problem p = make_problem(spec, 4, DType::kF32, 21);
    const auto y = run(p, serial_executor());
    std::vector<double> exact(4 * 16), magnitude(4 * 16);
    ref::matmul(p.w.view(), p.x32.data(), 4, p.bias.data(), exact.data(), magnitude.data());
    const std::int64_t run = run_columns(spec);
    for (std::int64_t m = 0; m < 4; ++m) {
      for (std::int64_t n = 0; n < 16; ++n) {
        double bound = 1e-5 * magnitude[static_cast<std::size_t>(m * 16 + n)];
        for (std::int64_t begin = 0; begin < spec.cols; begin += run) {
          double most = 0, weights = 0, inputs = 0, largest = 0;
          for (std::int64_t k = begin; k < std::min(spec.cols, begin + run); ++k) {
            const double a = std::fabs(p.x32[static_cast<std::size_t>(m * spec.cols + k)]);
            const double w = std::fabs(static_cast<double>(ref::value(p.w.view(), n, k)));
            most = std::max(most, a);
            largest = std::max(largest, w);
            weights += w;
            inputs += a;
          }
          bound += most / 254 * weights * 1.01;
          if (spec.code_map == CodeMap::kNf4) {
            float absmax = 0;
            std::memcpy(&absmax, p.w.stats.data() + (n * spec.cols + begin) / spec.group_size * 4,
                        4);
            bound += std::fabs(static_cast<double>(absmax)) / 254 * inputs * 1.01;
          }
        }
        float got = 0;
        std::memcpy(&got, y.data() + (m * 16 + n) * 4, 4);
        const double error = std::fabs(got - exact[static_cast<std::size_t>(m * 16 + n)]);
        EXPECT_LE(error, bound) << describe(spec);
      }
    }
  }
}

TEST_F(Int8Activations, RefusesFormsByName) {
  const auto refusal = [](const PackedSpec& spec) {
    const std::string text = int8_activations_refusal(spec);
    const PackedMatrix w = random_packed(spec, 1);
    std::vector<float> x(static_cast<std::size_t>(spec.cols)),
        y(static_cast<std::size_t>(spec.rows));
    try {
      matmul_int8_activations(w.view(), DType::kF32, x.data(), 1, nullptr, y.data(),
                              serial_executor());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kUnsupported);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
    return text;
  };
  EXPECT_EQ(refusal({.rows = 6, .cols = 128, .group_map = GroupMap::kColumnRuns, .group_size = 48}),
            "statistics are shared by rows, expected groups along rows");
  EXPECT_EQ(refusal({.rows = 2, .cols = 128, .bits = 8, .code_map = CodeMap::kE4M3}),
            "weights are 8-bit floats, expected integers or a table of 16 values");
  EXPECT_EQ(refusal({.rows = 2, .cols = 96, .group_size = 64}),
            "groups of 64 cross rows of 96, expected a divisor of in_features");
  EXPECT_EQ(refusal({.rows = 2, .cols = 96, .group_size = 24}),
            "groups of 24, expected a multiple of 16 or whole rows");
  EXPECT_EQ(int8_activations_refusal({.rows = 2, .cols = 24, .group_size = 24}), "");
  const PackedMatrix w = random_packed({.rows = 2, .cols = 64}, 1);
  try {
    matmul_int8_activations(w.view(), DType::kF32, nullptr, -1, nullptr, nullptr,
                            serial_executor());
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kShape);
  }
  matmul_int8_activations(w.view(), DType::kF32, nullptr, 0, nullptr, nullptr, serial_executor());
}

}  // namespace
}  // namespace quantal::testing

// The rounded quantizer primitives of every instruction set against the scalar truth, byte for
// byte, and quantized matrices for every kernel set and executor.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "formats/layers.h"
#include "kernels/rounded.h"
#include "kernels/rounded_power.h"
#include "kernels/support.h"

namespace quantal::testing {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

std::vector<const RoundedKernels*> vector_sets() {
  std::vector<const RoundedKernels*> out;
  for (const std::string_view name : available_cpu_kernels()) {
    if (name == "scalar") continue;
    select_cpu_kernels(name);
    // Sets that differ in products only share the primitives: avx512bf16 has those of avx512.
    EXPECT_TRUE(name.starts_with(rounded_kernels().name)) << name;
    if (!out.empty() && out.back() == &rounded_kernels()) continue;
    out.push_back(&rounded_kernels());
  }
  select_cpu_kernels(available_cpu_kernels().front());
  return out;
}

/// Numbers of one dtype: ordinary, tiny, huge, zeros of both signs.
std::vector<std::uint8_t> numbers(DType dtype, std::int64_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) {
    v = random.uniform(-1, 1) + random.uniform(-1, 1);
    switch (random.below(12)) {
      case 0:
        v = random.below(2) == 0 ? 0.0F : -0.0F;
        break;
      case 1:
        v *= 1e-7F;
        break;
      case 2:
        v *= 3e4F;
        break;
      case 3:
        v *= 1e-40F;
        break;
      default:
        break;
    }
  }
  std::vector<std::uint8_t> bytes(values.size() * dtype_size(dtype));
  narrow_from_f32(dtype, values.data(), n, bytes.data());
  return bytes;
}

std::vector<float> widened(DType dtype, const std::vector<std::uint8_t>& bytes) {
  std::vector<float> out(bytes.size() / dtype_size(dtype));
  widen_to_f32(dtype, bytes.data(), static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

template <class T>
void expect_same(const std::vector<T>& a, const std::vector<T>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(T)), 0) << what;
}

struct Results {
  std::vector<std::uint8_t> codes, codes_each;
  std::vector<float> low, high;
  std::vector<double> sums, zero, error;
};

Results run_all(const RoundedKernels& k, DType dtype, std::int64_t n, std::uint64_t seed,
                float zero) {
  const auto size = static_cast<std::size_t>(n);
  const auto w = numbers(dtype, n, seed);
  const auto scale = widened(dtype, numbers(dtype, n, seed + 1));
  const auto shift = widened(dtype, numbers(dtype, n, seed + 2));
  const std::vector<float> zeros(size, zero);
  const WeightRun run{dtype, w.data()};
  Results out;
  out.codes.resize(size);
  out.codes_each.resize(size);
  out.low = scale;
  out.high = shift;
  out.zero.resize(size);
  out.error.resize(size);
  const RoundedCode one = {scale[0], shift[0], zero, 15.0F, -zero};
  const RoundedCodes each = {scale.data(), shift.data(), zeros.data(), 255.0F, 0.0F};
  k.encode(run, n, one, out.codes.data());
  k.encode_each(run, n, each, out.codes_each.data());
  EXPECT_TRUE(k.range_each(run, n, out.low.data(), out.high.data()));
  const Shrink shrink = {0.1F, dtype == DType::kF32 ? -0.3F : -0.30078125F, 0.16F};
  const SolverSums s = k.shrink_step(run, n, {0.05F, 0.5F, 0.0F, 15.0F, 0.0F}, shrink);
  out.sums = {s.zero, s.error};
  std::vector<float> small(size, 0.125F), offset(size, 0.25F), none(size, 0.0F);
  k.shrink_step_each(run, n, {small.data(), offset.data(), none.data(), 3.0F, 0.0F}, shrink,
                     out.zero.data(), out.error.data());
  return out;
}

TEST(QuantoPrimitives, EveryInstructionSetEqualsScalar) {
  for (const RoundedKernels* set : vector_sets()) {
    for (const DType dtype : kTypes) {
      for (const std::int64_t n : {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 257}) {
        const auto seed = static_cast<std::uint64_t>(n * 31 + static_cast<int>(dtype));
        const float zero = n % 2 == 0 ? 0.0F : 8.0F;
        const std::string what = std::string(set->name) + " " + std::string(dtype_name(dtype)) +
                                 " n " + std::to_string(n);
        const Results a = run_all(*set, dtype, n, seed, zero);
        const Results b = run_all(rounded_kernels_scalar(), dtype, n, seed, zero);
        expect_same(a.codes, b.codes, what + " codes");
        expect_same(a.codes_each, b.codes_each, what + " codes_each");
        expect_same(a.low, b.low, what + " low");
        expect_same(a.high, b.high, what + " high");
        expect_same(a.sums, b.sums, what + " sums");
        expect_same(a.zero, b.zero, what + " zero");
        expect_same(a.error, b.error, what + " error");
      }
    }
  }
}

TEST(QuantoPrimitives, RangeReportsWhatIsNotFinite) {
  std::vector<const RoundedKernels*> sets = vector_sets();
  sets.push_back(&rounded_kernels_scalar());
  for (const RoundedKernels* set : sets) {
    for (const std::size_t at : {0u, 5u, 16u, 20u}) {
      for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        std::vector<float> w(21, 1.0F), low(21, 0.0F), high(21, 0.0F);
        w[at] = bad;
        EXPECT_FALSE(set->range_each({DType::kF32, w.data()}, 21, low.data(), high.data()))
            << set->name << " " << at;
      }
    }
  }
}

// Every finite binary16 number divided by one scale, against the definition in double: quotients
// below 2^-14 are subnormal, those above 65504 overflow.
TEST(QuantoPrimitives, Binary16QuotientsOfAllNumbers) {
  std::vector<std::uint16_t> all_numbers;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    if ((bits & 0x7C00u) != 0x7C00u) all_numbers.push_back(static_cast<std::uint16_t>(bits));
  }
  const auto n = static_cast<std::int64_t>(all_numbers.size());
  for (const RoundedKernels* set : vector_sets()) {
    for (const float scale : {0.0F, 0x1p-24F, 0.125F, 7.0F, 1000.0F}) {
      std::vector<std::uint8_t> a(all_numbers.size()), b(all_numbers.size());
      const RoundedCode code = {scale, 0.0F, 128.0F, 255.0F, 0.0F};
      set->encode({DType::kF16, all_numbers.data()}, n, code, a.data());
      rounded_kernels_scalar().encode({DType::kF16, all_numbers.data()}, n, code, b.data());
      expect_same(a, b, std::string(set->name) + " scale " + std::to_string(scale));
    }
  }
}

TEST(QuantoPrimitives, PowerIsWithinOneUlp) {
  Random random(11);
  for (int i = 0; i < 20000; ++i) {
    const float a = std::ldexp(random.uniform(0.5F, 1.0F), static_cast<int>(random.below(60)) - 30);
    for (const float y : {-0.3F, -0.30078125F, -0.30004883F}) {
      const double exact = std::pow(static_cast<double>(a), static_cast<double>(y));
      const auto nearest = static_cast<float>(exact);
      EXPECT_LE(std::abs(std::bit_cast<std::int32_t>(power_of_one(a, y)) -
                         std::bit_cast<std::int32_t>(nearest)),
                1)
          << a << " ^ " << y;
    }
  }
  EXPECT_EQ(power_of_one(0.0F, -0.3F), HUGE_VALF);
}

// ------------------------------------------------------------------ whole matrices

TEST(QuantoPrimitives, BytesDependOnNeitherKernelsNorExecutor) {
  using M = QuantizationMethod;
  const OddExecutor odd;
  const ThreadExecutor threads;
  for (const DType dtype : kTypes) {
    for (const std::int64_t cols : {33, 320, 768}) {
      Tensor input{dtype, {24, cols}, numbers(dtype, 24 * cols, 5)};
      for (const M method : {M::QUANTO_INT2, M::QUANTO_INT4, M::QUANTO_INT8}) {
        for (const char* mode : {"max", "zeropoint", "hqq"}) {
          if (method == M::QUANTO_INT8 && std::string(mode) != "max") continue;
          for (const int axis : {0, -1}) {
            QuantizeOptions options;
            options.method = method;
            options.mode = mode;
            options.axis = axis;
            options.value_dtype = dtype;
            select_cpu_kernels("scalar");
            const PackedMatrix expected = quantize(input.view(), options);
            for (const std::string_view name : available_cpu_kernels()) {
              select_cpu_kernels(name);
              expect_same_bytes(quantize(input.view(), options), expected, std::string(name));
              expect_same_bytes(quantize(input.view(), options, odd), expected, "odd pieces");
              expect_same_bytes(quantize(input.view(), options, threads), expected, "threads");
            }
          }
        }
      }
    }
  }
  select_cpu_kernels(available_cpu_kernels().front());
}

// A rank that holds some rows only quantizes them to the bytes of the whole (Reach::kRow).
TEST(QuantoPrimitives, RowsAreIndependent) {
  const Dialect& quanto = dialect_by_name("quanto");
  const Tensor input{DType::kBF16, {9, 256}, numbers(DType::kBF16, 9 * 256, 21)};
  for (const auto method : {QuantizationMethod::QUANTO_INT4, QuantizationMethod::QUANTO_INT8}) {
    QuantizeOptions options;
    options.method = method;
    options.value_dtype = DType::kBF16;
    ASSERT_EQ(quanto.reach(options), Reach::kRow);
    const PackedMatrix whole = quantize(input.view(), options);
    const PackedLayout layout = layout_of(whole.spec);
    for (std::int64_t r = 0; r < 9; ++r) {
      PackedSpec spec = whole.spec;
      spec.rows = 1;
      PackedMatrix one = make_packed(spec);
      quanto.quantize(spec, DType::kBF16, input.bytes.data() + r * 512, one.codes.data(),
                      one.stats.data(), one.shared.data(), serial_executor());
      EXPECT_EQ(std::memcmp(one.codes.data(), whole.codes.data() + r * layout.code_bytes,
                            one.codes.size()),
                0);
      EXPECT_EQ(std::memcmp(one.stats.data(), whole.stats.data() + r * layout.stat_bytes,
                            one.stats.size()),
                0);
    }
  }
}

}  // namespace
}  // namespace quantal::testing

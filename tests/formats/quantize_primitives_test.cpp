// The quantizer primitives of every instruction set against the scalar truth, byte for byte.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <map>

#include "core/half.h"
#include "kernels/quantize.h"
#include "kernels/quantize_power.h"
#include "kernels/support.h"
#include "quantal/kernels.h"

namespace quantal::testing {
namespace {

/// The vector sets that this machine can run.
std::vector<const QuantizeKernels*> vector_sets() {
  std::vector<const QuantizeKernels*> out;
  for (const std::string_view name : available_cpu_kernels()) {
    if (name == "scalar") continue;
    select_cpu_kernels(name);
    // Sets that differ in products only share the primitives: avx512bf16 has those of avx512.
    EXPECT_TRUE(name.starts_with(quantize_kernels().name)) << name;
    if (!out.empty() && out.back() == &quantize_kernels()) continue;
    out.push_back(&quantize_kernels());
  }
  select_cpu_kernels(available_cpu_kernels().front());
  return out;
}

constexpr std::int64_t kStride = 70;

/// kStride * n weights of one dtype.
struct Weights {
  std::vector<std::uint8_t> bytes;
  DType dtype;
  WeightRun run() const { return {dtype, bytes.data()}; }
};

Weights random_weights(DType dtype, std::int64_t n, float size, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(n * kStride));
  for (float& v : values) {
    v = (random.uniform(-1, 1) + random.uniform(-1, 1)) * size;
    if (random.below(50) == 0) v = random.below(2) == 0 ? 0.0F : -0.0F;
    if (random.below(200) == 0) v *= 30;
  }
  Weights w{std::vector<std::uint8_t>(values.size() * dtype_size(dtype)), dtype};
  narrow_from_f32(dtype, values.data(), n * kStride, w.bytes.data());
  return w;
}

/// Collects results as bytes.
class Record {
 public:
  template <class T>
  void add(const T* values, std::size_t n) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(values);
    bytes_.insert(bytes_.end(), p, p + n * sizeof(T));
  }
  template <class T>
  void add(T value) {
    add(&value, 1);
  }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

 private:
  std::vector<std::uint8_t> bytes_;
};

TableQuantizer test_table() {
  TableQuantizer table;
  for (std::size_t i = 0; i < 16; ++i) {
    table.thresholds[i] = -0.9F + 0.123F * static_cast<float>(i);
    table.codes[i] = static_cast<std::uint8_t>((i * 7) & 15);
  }
  return table;
}

void record_runs(const QuantizeKernels& k, WeightRun w, std::int64_t n, Record& record) {
  const auto size = static_cast<std::size_t>(n);
  std::vector<std::uint8_t> codes(size);
  const float absmax = k.absmax(w, n);
  record.add(absmax);
  const TableQuantizer table = test_table();
  k.encode_table(table, w, n, 1.0F / absmax, false, codes.data());
  record.add(codes.data(), size);
  k.encode_table(table, w, n, absmax, true, codes.data());
  record.add(codes.data(), size);
  const Range range = k.range(w, n);
  record.add(range.low);
  record.add(range.high);
  record.add(range.finite);
  for (const float max_code : {15.0F, 255.0F}) {
    const float scale = n > 1 ? max_code / (range.high - range.low) : 1.0F;
    const AffineCode code{scale, -range.low * scale + 0.3F, max_code};
    const SolverSums sums = k.solver_step(w, n, code);
    record.add(sums.zero);
    record.add(sums.error);
    k.encode_affine(w, n, code, codes.data());
    record.add(codes.data(), size);
  }
}

void record_columns(const QuantizeKernels& k, WeightRun w, std::int64_t n, std::int64_t count,
                    Record& record) {
  const auto size = static_cast<std::size_t>(count);
  std::vector<float> low(size), high(size), scale(size), zero(size);
  record.add(k.range_columns(w, n, kStride, count, low.data(), high.data()));
  record.add(low.data(), size);
  record.add(high.data(), size);
  for (std::size_t j = 0; j < size; ++j) {
    scale[j] = high[j] > low[j] ? 15.0F / (high[j] - low[j]) : 1.0F;
    zero[j] = -low[j] * scale[j];
  }
  std::vector<SolverSums> sums(size);
  k.solver_step_columns(w, n, kStride, count, scale.data(), zero.data(), 15.0F, sums.data());
  record.add(sums.data(), size);
  std::vector<std::uint8_t> codes(size);
  k.encode_affine_each(w, count, scale.data(), zero.data(), 15.0F, codes.data());
  record.add(codes.data(), size);
}

std::vector<std::uint8_t> everything(const QuantizeKernels& k, const Weights& w, std::int64_t n) {
  Record record;
  record_runs(k, w.run(), n, record);
  for (const std::int64_t count : {1, 5, 16, 33, 64}) record_columns(k, w.run(), n, count, record);
  return record.bytes();
}

TEST(QuantizePrimitives, EverySetGivesTheBytesOfTheScalarTruth) {
  const auto sets = vector_sets();
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const std::int64_t n : {1, 3, 15, 16, 17, 31, 64, 100, 257}) {
      // Residuals above and below the solver's shrink limit, and subnormal numbers.
      for (const float size : {0.02F, 3.0F, 1e-30F, 1e-40F}) {
        const Weights w = random_weights(dtype, n, size, static_cast<std::uint64_t>(n));
        const auto truth = everything(quantize_kernels_scalar(), w, n);
        for (const QuantizeKernels* set : sets) {
          EXPECT_EQ(everything(*set, w, n) == truth, true)
              << set->name << " " << dtype_name(dtype) << " n=" << n << " size=" << size;
        }
      }
    }
  }
}

TEST(QuantizePrimitives, WideningIsExactForEveryHalf) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    std::vector<std::uint16_t> all;
    for (std::uint32_t h = 0; h < 65536; ++h) {
      const float f = dtype == DType::kF16 ? f16_to_f32(static_cast<std::uint16_t>(h))
                                           : bf16_to_f32(static_cast<std::uint16_t>(h));
      if (std::isfinite(f)) all.push_back(static_cast<std::uint16_t>(h));
    }
    for (const QuantizeKernels* set : vector_sets()) {
      for (std::size_t i = 0; i < all.size(); ++i) {
        // The range of 16 equal weights is that weight, whichever way it was read.
        const std::vector<std::uint16_t> same(16, all[i]);
        const Range r = set->range({dtype, same.data()}, 16);
        const float f = dtype == DType::kF16 ? f16_to_f32(all[i]) : bf16_to_f32(all[i]);
        ASSERT_EQ(std::bit_cast<std::uint32_t>(r.low), std::bit_cast<std::uint32_t>(f));
      }
    }
  }
}

TEST(QuantizePrimitives, NotFiniteIsSeenInEveryLane) {
  std::vector<const QuantizeKernels*> sets = vector_sets();
  sets.push_back(&quantize_kernels_scalar());
  for (const QuantizeKernels* set : sets) {
    for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      for (std::size_t at = 0; at < 37; ++at) {
        std::vector<float> w(37, 0.5F);
        w[at] = bad;
        const WeightRun run{DType::kF32, w.data()};
        EXPECT_FALSE(set->absmax(run, 37) < HUGE_VALF) << set->name << at;
        EXPECT_FALSE(set->range(run, 37).finite) << set->name << at;
        float low[37], high[37];
        EXPECT_FALSE(set->range_columns(run, 1, 37, 37, low, high)) << set->name << at;
      }
    }
  }
}

TEST(QuantizePrimitives, PowerIsWithinItsBound) {
  std::vector<float> in;
  for (std::uint32_t bits = 1; bits < 0x7F800000u; bits += 20011) {
    in.push_back(std::bit_cast<float>(bits));
  }
  std::vector<float> truth(in.size()), out(in.size());
  const auto n = static_cast<std::int64_t>(in.size());
  quantize_kernels_scalar().power(in.data(), n, truth.data());
  double worst = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const long double exact =
        std::pow(static_cast<long double>(in[i]), static_cast<long double>(kSolverPower));
    int exponent = 0;
    std::frexp(exact, &exponent);
    const long double ulp = std::ldexp(1.0L, exponent - 24);
    const long double off = std::fabs(static_cast<long double>(truth[i]) - exact) / ulp;
    worst = std::max(worst, static_cast<double>(off));
  }
  EXPECT_LE(worst, 0.51);
  for (const QuantizeKernels* set : vector_sets()) {
    set->power(in.data(), n, out.data());
    EXPECT_EQ(std::memcmp(out.data(), truth.data(), out.size() * sizeof(float)), 0) << set->name;
  }
  const float zero = 0;
  float infinite = 0;
  quantize_kernels_scalar().power(&zero, 1, &infinite);
  EXPECT_EQ(infinite, HUGE_VALF);
}

TEST(QuantizePrimitives, NoShrinkLimitIsExact) {
  // Everything up to the limit shrinks to nothing; just above the true zero at 0.17 it does not.
  for (float a = 0; a <= kSolverNoShrink; a += 1e-4F) {
    float p = 0;
    quantize_kernels_scalar().power(&a, 1, &p);
    EXPECT_LT(a - kSolverInverseBeta * p, 0.0F) << a;
  }
  const float above = 0.171F;
  float p = 0;
  quantize_kernels_scalar().power(&above, 1, &p);
  EXPECT_GT(above - kSolverInverseBeta * p, 0.0F);
}

}  // namespace
}  // namespace quantal::testing

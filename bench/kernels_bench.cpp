// Speed of the kernels on one thread, weights cold: every call takes the next of several copies
// that together exceed the last-level cache, as a model's layers do.
//
//   quantal_bench --benchmark_filter='matmul/.*/m:1$'
//   QUANTAL_CPU=avx2 quantal_bench
//
// bytes_per_second counts packed bytes for products and output bytes for dequantize.
#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "quantal/kernels.h"

namespace {

using namespace quantal;

constexpr std::size_t kColdBytes = std::size_t{96} << 20;

struct Case {
  const char* name;
  PackedSpec spec;
};

const Case kCases[] = {
    {"nf4_g64",
     {.rows = 4096, .cols = 4096, .code_map = CodeMap::kNf4, .value_dtype = DType::kBF16}},
    {"nf4_nested_g64",
     {.rows = 4096,
      .cols = 4096,
      .code_map = CodeMap::kNf4,
      .scale = ScaleSource::kNestedU8,
      .value_dtype = DType::kBF16}},
    {"hqq4_g64", {.rows = 4096, .cols = 4096, .offset = Offset::kZeroPoint}},
    {"hqq4_f16_g64",
     {.rows = 4096,
      .cols = 4096,
      .offset = Offset::kZeroPoint,
      .scale = ScaleSource::kF16,
      .value_dtype = DType::kF16}},
    {"hqq8_g128",
     {.rows = 4096, .cols = 4096, .bits = 8, .offset = Offset::kZeroPoint, .group_size = 128}},
    {"hqq8_g128_crossing",
     {.rows = 1536, .cols = 576, .bits = 8, .offset = Offset::kZeroPoint, .group_size = 128}},
};

/// Copies of one matrix with random codes and scales of 1.
class ColdMatrices {
 public:
  explicit ColdMatrices(const PackedSpec& spec) {
    PackedMatrix w = make_packed(spec);
    std::mt19937 random(1);
    for (auto& c : w.codes) c = static_cast<std::uint8_t>(random());
    const std::int64_t groups = ceil_div(spec.rows * spec.cols, spec.group_size);
    std::vector<std::uint8_t> ones;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint8_t f32[] = {0, 0, 0x80, 0x3F};
      const std::uint8_t f16[] = {0, 0x3C};
      if (spec.scale == ScaleSource::kF32) ones.insert(ones.end(), f32, f32 + 4);
      if (spec.scale == ScaleSource::kF16) ones.insert(ones.end(), f16, f16 + 2);
      if (spec.scale == ScaleSource::kNestedU8) ones.push_back(static_cast<std::uint8_t>(g));
    }
    const std::vector<float> absmax2(static_cast<std::size_t>(groups), 0.01F);
    spread_stats(spec, {ones.data(), ones.data(), absmax2.data()}, 0, w.stats.data(),
                 serial_executor());
    bytes_ = w.codes.size() + w.stats.size();
    copies_.assign(kColdBytes / bytes_ + 1, w);
  }
  PackedView next() { return copies_[i_++ % copies_.size()].view(); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::vector<PackedMatrix> copies_;
  std::size_t bytes_ = 0, i_ = 0;
};

void set_bytes(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) *
                          static_cast<std::int64_t>(state.iterations()));
}

void bench_matmul(benchmark::State& state, const PackedSpec& spec, DType dtype, std::int64_t m,
                  bool transposed) {
  ColdMatrices w(spec);
  const std::size_t n =
      static_cast<std::size_t>(m * std::max(spec.rows, spec.cols)) * dtype_size(dtype);
  const std::vector<std::uint8_t> x(n, 0);
  std::vector<std::uint8_t> y(n);
  for (auto _ : state) {
    if (transposed) {
      matmul_transposed(w.next(), dtype, x.data(), m, y.data(), serial_executor());
    } else {
      matmul(w.next(), dtype, x.data(), m, nullptr, y.data(), serial_executor());
    }
    benchmark::ClobberMemory();
  }
  set_bytes(state, w.bytes());
}

void bench_dequantize(benchmark::State& state, const PackedSpec& spec, DType dtype) {
  ColdMatrices w(spec);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(spec.rows * spec.cols) *
                                dtype_size(dtype));
  for (auto _ : state) {
    dequantize(w.next(), {0, spec.rows, 0, spec.cols}, dtype, out.data(), spec.cols,
               serial_executor());
    benchmark::ClobberMemory();
  }
  set_bytes(state, out.size());
}

/// The roof: plain copy into a buffer of the size that dequantize to bf16 writes.
void bench_copy(benchmark::State& state) {
  const std::size_t n = std::size_t{4096} * 4096 * 2;
  std::vector<std::uint8_t> from(n, 1), to(n);
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), n);
    benchmark::ClobberMemory();
  }
  set_bytes(state, n);
}

void register_all() {
  benchmark::RegisterBenchmark("copy", bench_copy);
  for (const Case& c : kCases) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const std::string suffix = std::string(c.name) + "/" + std::string(dtype_name(dtype));
      benchmark::RegisterBenchmark(("dequantize/" + suffix).c_str(), bench_dequantize, c.spec,
                                   dtype);
      for (std::int64_t m : {1, 2, 4, 8, 16, 32}) {
        const std::string rows = suffix + "/m:" + std::to_string(m);
        benchmark::RegisterBenchmark(("matmul/" + rows).c_str(), bench_matmul, c.spec, dtype, m,
                                     false);
        benchmark::RegisterBenchmark(("transposed/" + rows).c_str(), bench_matmul, c.spec, dtype, m,
                                     true);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("kernels", std::string(active_cpu_kernels()));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

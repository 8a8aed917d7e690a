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

constexpr PackedSpec square(PackedSpec spec) {
  spec.rows = spec.cols = 4096;
  return spec;
}

const Case kCases[] = {
    {"nf4_g64", square({.code_map = CodeMap::kNf4, .value_dtype = DType::kBF16})},
    {"nf4_nested_g64", square({.code_map = CodeMap::kNf4,
                               .scale = ScaleSource::kNestedU8,
                               .value_dtype = DType::kBF16})},
    {"hqq4_g64", square({.offset = Offset::kZeroPoint})},
    {"hqq4_f16_g64",
     square(
         {.offset = Offset::kZeroPoint, .scale = ScaleSource::kF16, .value_dtype = DType::kF16})},
    {"hqq4_axis0_g64", square({.offset = Offset::kZeroPoint, .group_map = GroupMap::kColumnRuns})},
    {"hqq8_g128", square({.bits = 8, .offset = Offset::kZeroPoint, .group_size = 128})},
    {"hqq8_g128_crossing",
     {.rows = 1536, .cols = 576, .bits = 8, .offset = Offset::kZeroPoint, .group_size = 128}},
    {"hqq3_g64", square({.bits = 3, .offset = Offset::kZeroPoint})},
    {"hqq2_g64", square({.bits = 2, .offset = Offset::kZeroPoint})},
    {"hqq1_g64", square({.bits = 1, .offset = Offset::kZeroPoint})},
    {"mlx2_g64", square({.bits = 2,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16})},
    {"mlx3_g64", square({.bits = 3,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16})},
    {"mlx4_g32", square({.bits = 4,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16,
                         .group_size = 32})},
    {"mlx5_g64", square({.bits = 5,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16})},
    {"mlx6_g64", square({.bits = 6,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16})},
    {"mlx8_g64", square({.bits = 8,
                         .offset = Offset::kBias,
                         .scale = ScaleSource::kBF16,
                         .value_dtype = DType::kBF16})},
    {"mxfp4", square({.code_map = CodeMap::kE2M1,
                      .scale = ScaleSource::kE8M0,
                      .value_dtype = DType::kBF16,
                      .group_size = 32})},
    {"nvfp4", square({.code_map = CodeMap::kE2M1,
                      .scale = ScaleSource::kE4M3,
                      .value_dtype = DType::kBF16,
                      .group_size = 16})},
    {"mxfp8", square({.bits = 8,
                      .code_map = CodeMap::kE4M3,
                      .scale = ScaleSource::kE8M0,
                      .value_dtype = DType::kBF16,
                      .group_size = 32})},
    {"bnb_int8",
     square({.bits = 8, .centre = 128, .offset = Offset::kOver127, .group_size = 4096})},
    {"q4_1", square({.offset = Offset::kBias, .scale = ScaleSource::kF16, .group_size = 32})},
    {"q5_0", square({.bits = 5, .centre = 16, .scale = ScaleSource::kF16, .group_size = 32})},
    {"q8_0", square({.bits = 8, .centre = 128, .scale = ScaleSource::kF16, .group_size = 32})},
    {"q2_k", square({.bits = 2,
                     .offset = Offset::kShift,
                     .scale = ScaleSource::kSuperU4,
                     .group_size = 16,
                     .nested_group_size = 16})},
    {"q3_k", square({.bits = 3,
                     .centre = 4,
                     .scale = ScaleSource::kSuperI8,
                     .group_size = 16,
                     .nested_group_size = 16})},
    {"q4_k", square({.offset = Offset::kShift,
                     .scale = ScaleSource::kSuperU8,
                     .group_size = 32,
                     .nested_group_size = 8})},
    {"q5_k", square({.bits = 5,
                     .offset = Offset::kShift,
                     .scale = ScaleSource::kSuperU8,
                     .group_size = 32,
                     .nested_group_size = 8})},
    {"q6_k", square({.bits = 6,
                     .centre = 32,
                     .scale = ScaleSource::kSuperI8,
                     .group_size = 16,
                     .nested_group_size = 16})},
};

/// Scales and offsets of 1 (one-byte scales: any byte), nested absmax of 0.01.
void fill_statistics(PackedMatrix& w) {
  const PackedSpec& spec = w.spec;
  const std::size_t groups =
      static_cast<std::size_t>(ceil_div(spec.rows * spec.cols, spec.group_size) *
                               (spec.group_map != GroupMap::kRowRuns ? 2 : 1));
  std::vector<std::uint8_t> ones;
  for (std::size_t g = 0; g < groups; ++g) {
    const std::uint8_t f32[] = {0, 0, 0x80, 0x3F};
    const std::uint8_t f16[] = {0, 0x3C};
    if (spec.scale == ScaleSource::kF32) {
      ones.insert(ones.end(), f32, f32 + 4);
    } else if (spec.scale == ScaleSource::kF16 || spec.scale == ScaleSource::kBF16) {
      ones.insert(ones.end(), f16, f16 + 2);
    } else {
      ones.push_back(static_cast<std::uint8_t>(g % 100));
    }
  }
  if (spec.group_map != GroupMap::kRowRuns) {
    std::memcpy(w.stats.data(), ones.data(), w.stats.size());
    return;
  }
  const std::vector<float> absmax2(groups, 0.01F);
  const std::vector<std::uint16_t> supers(groups, 0x1400);
  spread_stats(spec,
               {.scales = ones.data(),
                .offsets = ones.data(),
                .absmax2 = absmax2.data(),
                .supers = supers.data(),
                .super_offsets = supers.data()},
               0, w.stats.data(), serial_executor());
}

/// Copies of one matrix with random codes and scales of 1.
class ColdMatrices {
 public:
  explicit ColdMatrices(const PackedSpec& spec) {
    PackedMatrix w = make_packed(spec);
    std::mt19937 random(1);
    for (auto& c : w.codes) c = static_cast<std::uint8_t>(random());
    fill_statistics(w);
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
        if (!supports_packed_matmul(c.spec)) break;
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

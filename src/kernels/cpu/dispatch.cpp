#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/int_kernels.h"
#include "kernels/cpu/low_rank_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace quantal {
namespace {

template <class A, class B>
constexpr bool same_number(A a, B b) {
  return static_cast<int>(a) == static_cast<int>(b);
}
static_assert(same_number(FloatKind::kF32, DType::kF32) &&
              same_number(FloatKind::kF16, DType::kF16) &&
              same_number(FloatKind::kBF16, DType::kBF16));
static_assert(same_number(OffsetKind::kBias, Offset::kBias) &&
              same_number(OffsetKind::kShift, Offset::kShift) &&
              same_number(OffsetKind::kZeroPoint, Offset::kZeroPoint) &&
              same_number(OffsetKind::kOver127, Offset::kOver127) && kOneOver127 == kInverse127);
static_assert(same_number(ScaleKind::kF16, ScaleSource::kF16) &&
              same_number(ScaleKind::kBF16, ScaleSource::kBF16) &&
              same_number(ScaleKind::kNestedU8, ScaleSource::kNestedU8) &&
              same_number(ScaleKind::kE8M0, ScaleSource::kE8M0) &&
              same_number(ScaleKind::kE4M3, ScaleSource::kE4M3) &&
              same_number(ScaleKind::kSuperU8, ScaleSource::kSuperU8) &&
              same_number(ScaleKind::kSuperI8, ScaleSource::kSuperI8) &&
              same_number(ScaleKind::kSuperU4, ScaleSource::kSuperU4));
static_assert(same_number(GroupKind::kRowRuns, GroupMap::kRowRuns) &&
              same_number(GroupKind::kColumnRuns, GroupMap::kColumnRuns) &&
              same_number(GroupKind::kColumnBlocks, GroupMap::kColumnBlocks));
// expand_plain reads a scale's storage type as the float kind of the same number.
static_assert(same_number(ScaleKind::kF32, FloatKind::kF32) &&
              same_number(ScaleKind::kF16, FloatKind::kF16) &&
              same_number(ScaleKind::kBF16, FloatKind::kBF16));

bool always() noexcept { return true; }

#if defined(__x86_64__)
bool has_avx2() noexcept {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() noexcept {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() noexcept { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
/// AMX_BF16: leaf 7, edx. Such a set differs by where the framework's product takes over.
bool has_amx() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx >> 22 & 1U) != 0;
}
bool has_avx512_vnni() noexcept { return __builtin_cpu_supports("avx512vnni") != 0; }
/// AVX-VNNI: leaf 7, subleaf 1, eax.
bool has_avx_vnni() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1U) != 0;
}
const Int8Kernels& int8_kernels_best_avx512() { return int8_kernels_avx512(has_avx512_vnni()); }
const IntKernels& int_kernels_best_avx512() {
  return has_avx512_vnni() ? int_kernels_avx512vnni() : int_kernels_avx512();
}
const IntKernels& int_kernels_best_avx2() {
  static const bool vnni = has_avx_vnni();
  return vnni ? int_kernels_avxvnni() : int_kernels_avx2();
}
#elif defined(__aarch64__)
const IntKernels& int_kernels_best_neon() {
#if defined(__linux__) && defined(HWCAP_ASIMDDP)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) return int_kernels_neondot();
#elif defined(__APPLE__)
  return int_kernels_neondot();  // every processor of these machines has it
#endif
  return int_kernels_neon();
}
#endif

// Rows of activations (float32, float16, bfloat16) up to which the packed products beat dequantized
// panels and the framework's dense product. Measured at 4096 x 4096, 4 bits, group 64, one Zen 5
// core against torch 2.13: with AVX512_BF16 the product from packed codes equals torch's product of
// an undecoded bfloat16 matrix from 64 rows to 512 (445 to 443 GFLOP/s; backward 346 to 377 at 512,
// 310 to 228 at 64), so panels are never wanted (docs/performance.md). AVX-512 without it:
// float32 4.1 ms at 16 inputs and 8.1 ms at 32, torch's product alone 10.1 and 16.0 ms; 16 bits 2.9
// ms at 8 and 4.6 ms at 16, torch 2.2 and 2.8 ms plus 1.4 ms to dequantize. AVX2 and NEON machines
// were not measured against their own torch; theirs are half, as is the speed of the AVX2 kernels
// here. Machines with AMX were not measured either: their dense product is several times faster
// than AVX512_BF16.
constexpr int kAnyRows = 1 << 30;
constexpr MaxRows kAvx512Rows = {{32, 12, 12}};
constexpr MaxRows kBf16Rows = {{32, 12, kAnyRows}};
constexpr MaxRows kAmxRows = {{32, 12, 32}};
constexpr MaxRows kHalfRows = {{16, 6, 6}};
constexpr MaxRows kScalarRows = {{1, 1, 1}};

// Best first.
const CpuKernels kSets[] = {
#if defined(__x86_64__)
    {"avx512amx", has_amx, dequantize_avx512bf16, matmul_avx512, matmul_transposed_avx512,
     widen_avx512, int8_kernels_best_avx512, int_kernels_best_avx512, bf16_kernels_avx512bf16,
     few_rows_attention_avx512, nullptr, low_rank_kernels_avx512, kAmxRows, kAmxRows},
    {"avx512bf16", has_avx512_bf16, dequantize_avx512bf16, matmul_avx512, matmul_transposed_avx512,
     widen_avx512, int8_kernels_best_avx512, int_kernels_best_avx512, bf16_kernels_avx512bf16,
     few_rows_attention_avx512, block_attention_avx512bf16, low_rank_kernels_avx512, kBf16Rows,
     kBf16Rows},
    {"avx512", has_avx512, dequantize_avx512, matmul_avx512, matmul_transposed_avx512, widen_avx512,
     int8_kernels_best_avx512, int_kernels_best_avx512, nullptr, few_rows_attention_avx512, nullptr,
     low_rank_kernels_avx512, kAvx512Rows, kAvx512Rows},
    {"avx2", has_avx2, dequantize_avx2, matmul_avx2, matmul_transposed_avx2, widen_avx2,
     int8_kernels_avx2, int_kernels_best_avx2, nullptr, few_rows_attention_avx2, nullptr,
     low_rank_kernels_avx2, kHalfRows, kHalfRows},
#elif defined(__aarch64__)
    {"neon", always, dequantize_neon, matmul_neon, matmul_transposed_neon, widen_neon,
     int8_kernels_neon, int_kernels_best_neon, nullptr, few_rows_attention_neon, nullptr,
     low_rank_kernels_neon, kHalfRows, kHalfRows},
#endif
    {"scalar", always, dequantize_scalar, matmul_scalar, matmul_transposed_scalar, widen_scalar,
     int8_kernels_scalar, int_kernels_scalar, nullptr, few_rows_attention_scalar, nullptr,
     low_rank_kernels_scalar, kScalarRows, kScalarRows},
};

std::atomic<const CpuKernels*> g_active{nullptr};

std::string available_names() {
  std::string names;
  for (const CpuKernels& set : kSets) {
    if (set.supported()) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  return names;
}

const CpuKernels& find_set(std::string_view name, const char* where) {
  for (const CpuKernels& set : kSets) {
    if (name == set.name && set.supported()) return set;
  }
  fail(Errc::kDevice, std::string(where) + ": kernel set is '" + std::string(name) +
                          "', expected one that this machine runs: " + available_names());
}

const CpuKernels& initial_set() {
  const char* forced = std::getenv("QUANTAL_CPU");
  if (forced != nullptr && *forced != '\0') return find_set(forced, "QUANTAL_CPU");
  return *std::find_if(std::begin(kSets), std::end(kSets),
                       [](const CpuKernels& set) { return set.supported(); });
}

float read_f32(const std::uint8_t* p) {
  float v = 0.0F;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

void fill_table(const PackedView& w, KernelMatrix& m) {
  const std::size_t code_mask = (std::size_t{1} << std::min(w.spec.bits, 4)) - 1;
  for (std::size_t i = 0; i < 16; ++i) {
    switch (w.spec.code_map) {
      case CodeMap::kInteger:
        m.table[i] = static_cast<float>(static_cast<int>(i & code_mask) - w.spec.centre);
        break;
      case CodeMap::kNf4:
        m.table[i] = kNf4Codebook[i];
        break;
      case CodeMap::kFp4:
        m.table[i] = kFp4Codebook[i];
        break;
      case CodeMap::kTable:
        m.table[i] = read_f32(w.shared.data() + 4 * i);
        break;
      case CodeMap::kE2M1:
        m.table[i] = kE2M1Codebook[i];
        break;
      case CodeMap::kIq4Nl:
        m.table[i] = kIq4NlCodebook[i];
        break;
      case CodeMap::kE4M3:
      case CodeMap::kE5M2:
        break;  // 8 bits
    }
  }
}

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* set = g_active.load(std::memory_order_acquire);
  if (set == nullptr) {
    const CpuKernels* initial = &initial_set();
    // A set selected meanwhile by another thread stays.
    if (g_active.compare_exchange_strong(set, initial)) set = initial;
  }
  return *set;
}

std::string_view active_cpu_kernels() { return cpu_kernels().name; }

std::vector<std::string_view> available_cpu_kernels() {
  std::vector<std::string_view> names;
  for (const CpuKernels& set : kSets) {
    if (set.supported()) names.emplace_back(set.name);
  }
  return names;
}

void select_cpu_kernels(std::string_view name) {
  g_active.store(&find_set(name, "select_cpu_kernels"), std::memory_order_release);
}

FloatKind float_kind(DType dtype, const char* where, const char* what) {
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype, std::string(where) + ": " + what + " is " + std::string(dtype_name(dtype)) +
                           ", expected f32, f16 or bf16");
  }
  return static_cast<FloatKind>(dtype);
}

KernelMatrix kernel_matrix(const PackedView& w) {
  check_packed(w);
  const PackedLayout layout = layout_of(w.spec);
  KernelMatrix m{};
  m.codes = w.codes.data();
  m.stats = w.stats.data();
  m.stats_end = w.stats.data() + w.stats.size();
  m.code_bytes = layout.code_bytes;
  m.stat_bytes = layout.stat_bytes;
  m.rows = w.spec.rows;
  m.cols = w.spec.cols;
  m.group_size = w.spec.group_size;
  m.nested_group_size = w.spec.nested_group_size;
  m.slots = layout.slots;
  m.nested_slots = layout.nested_slots;
  m.column_stats = w.spec.group_map == GroupMap::kColumnRuns ? layout.stat_rows : 0;
  m.has_header = layout.has_header;
  m.has_offsets = stores_offsets(w.spec.offset);
  m.bits = w.spec.bits;
  m.groups = static_cast<GroupKind>(w.spec.group_map);
  m.code_kind = w.spec.code_map == CodeMap::kE4M3   ? CodeKind::kE4M3
                : w.spec.code_map == CodeMap::kE5M2 ? CodeKind::kE5M2
                                                    : CodeKind::kNumber;
  m.offset = static_cast<OffsetKind>(w.spec.offset);
  m.scale = static_cast<ScaleKind>(w.spec.scale);
  m.value_kind = static_cast<FloatKind>(w.spec.value_dtype);
  m.centre = static_cast<float>(w.spec.centre);
  fill_table(w, m);
  if (w.spec.scale == ScaleSource::kNestedU8) {
    const std::uint8_t* shared = w.shared.data() + (w.spec.code_map == CodeMap::kTable ? 64 : 0);
    m.nested_offset = read_f32(shared);
    std::memcpy(m.nested_map, shared + 4, sizeof(m.nested_map));
  }
  return m;
}

}  // namespace quantal

// What crosses the line between the dispatcher and the files of one instruction set: plain structs
// and function pointers. Only <cstdint> and <cstddef> may be included here (style: "How a kernel is
// written", point 3).
#pragma once

#include <cstdint>

namespace quantal {

/// Activation rows that one call of a product takes; callers cut larger inputs.
inline constexpr int kMaxInputRows = 16;
inline constexpr std::int64_t kMaxBf16Inputs = 512;  ///< the same of Bf16Kernels
/// Accumulators of `matmul` are added to a running total after this many columns, those of
/// `matmul_transposed` after kTransposedBlockRows rows (kTransposedBigBlockRows for matrices of
/// more than kTransposedManyRows rows). Part of the defined summation order.
inline constexpr std::int64_t kSumColumns = 4096;
inline constexpr std::int64_t kTransposedBlockRows = 64;
inline constexpr std::int64_t kTransposedBigBlockRows = 512;
inline constexpr std::int64_t kTransposedManyRows = 65536;

/// DType of values and activations; equal to quantal::DType (checked in dispatch.cpp).
enum class FloatKind : int { kF32 = 0, kF16 = 1, kBF16 = 2 };
/// quantal::Offset.
enum class OffsetKind : int { kNone = 0, kBias = 1, kShift = 2, kZeroPoint = 3, kOver127 = 4 };
inline constexpr float kOneOver127 = 1.0F / 127.0F;
/// quantal::ScaleSource.
enum class ScaleKind : int {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kNestedU8 = 3,
  kE8M0 = 4,
  kE4M3 = 5,
  kSuperU8 = 6,
  kSuperI8 = 7,
  kSuperU4 = 8
};
/// quantal::GroupMap.
enum class GroupKind : int { kRowRuns = 0, kColumnRuns = 1, kColumnBlocks = 2 };
/// What codes of more than 4 bits are: code - centre, or an 8-bit float.
enum class CodeKind : int { kNumber, kE4M3, kE5M2 };

/// A checked packed matrix in raw pointers; the layout is that of quantal/kernels.h.
struct KernelMatrix {
  const std::uint8_t* codes;
  const std::uint8_t* stats;
  const std::uint8_t* stats_end;  ///< nothing is read at or beyond it
  std::int64_t code_bytes, stat_bytes;
  std::int64_t rows, cols;
  std::int64_t group_size, nested_group_size;
  std::int64_t slots, nested_slots;
  std::int64_t column_stats;  ///< column runs: number of statistics
  bool has_header;
  bool has_offsets;  ///< a stored offset stands beside each scale
  int bits;
  GroupKind groups;
  CodeKind code_kind;
  OffsetKind offset;
  ScaleKind scale;
  FloatKind value_kind;
  float centre;                 ///< numbers: value = code - centre
  float nested_offset;          ///< nested scales only, as the map
  alignas(64) float table[16];  ///< up to 4 bits: value = table[code]; fewer values repeat
  alignas(64) float nested_map[256];
};

/// Rectangle of the matrix and its destination (`ld` in elements).
struct DequantizeJob {
  std::int64_t row_begin, row_end, col_begin, col_end;
  FloatKind out_kind;
  void* out;
  std::int64_t ld;
};

/// y[m, n] = sum_k x[m, k] w(n, k) + bias[n]. x is float32 with rows of ldx >= cols rounded up to
/// 16, zero beyond cols. y has rows of ldy elements. inputs <= kMaxInputRows.
struct MatmulJob {
  const float* x;
  std::int64_t ldx;
  int inputs;
  const float* bias;
  FloatKind y_kind;
  void* y;
  std::int64_t ldy;
};

/// The same with bfloat16 for x (rows of ldx elements from Bf16Kernels::pack), w and y.
struct Bf16Job {
  const std::uint16_t* x;
  std::int64_t ldx;
  std::int64_t inputs;  ///< <= kMaxBf16Inputs
  const float* bias;
  std::uint16_t* y;
  std::int64_t ldy;
  float* scratch = nullptr;  ///< the calling thread's own, kBf16ScratchFloats, whole cache lines
};

/// y[m, k] = sum_n g[m, n] w(n, k). g is float32 with rows of ldg >= rows elements.
struct TransposedJob {
  const float* g;
  std::int64_t ldg;
  int inputs;
  FloatKind y_kind;
  void* y;
  std::int64_t ldy;
};

/// Columns [col, col + count) of a row, col a multiple of 16, as float32; zero up to the next
/// multiple of 16.
using DecodeRow = void (*)(const KernelMatrix& w, std::int64_t row, std::int64_t col,
                           std::int64_t count, float* out) noexcept;

/// Activations in the form in which products read them: rows that stand together are a tile, which
/// begins where its first row would. Tile t of `count` are rows [t * inputs / count, (t + 1) *
/// inputs / count).
struct Bf16Tiles {
  std::int64_t width;  ///< elements of a row
  std::int64_t count;
};

struct Int8Kernels;
struct IntKernels;
struct BlockAttention;
struct FewRowsAttention;
struct LowRankKernels;

/// Products of bfloat16 activations with weights rounded to bfloat16, where the processor has
/// instructions for them.
struct Bf16Kernels {
  /// How `inputs` rows of activations are packed.
  Bf16Tiles (*tiles)(const KernelMatrix& w, std::int64_t inputs) noexcept;
  /// `rows` rows of w.cols activations, one tile of `inputs` in all.
  void (*pack)(const KernelMatrix& w, std::int64_t inputs, const std::uint16_t* in,
               std::int64_t rows, std::uint16_t* out) noexcept;
  /// Output rows [row_begin, row_end).
  void (*matmul)(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_begin,
                 std::int64_t row_end) noexcept;
  /// Output columns [col_begin, col_end) of y[m, k] = sum_n x[m, n] w(n, k); col_begin is a
  /// multiple of quantal::kColumnUnit. x has w.rows elements in a row and a zero after an odd
  /// number of them.
  void (*matmul_transposed)(const KernelMatrix& w, const Bf16Job& job, std::int64_t col_begin,
                            std::int64_t col_end) noexcept;
};
/// Scales are applied to sums where the matrix allows it: of so few inputs by rows of weights, of
/// more with a row in each lane.
inline constexpr std::int64_t kMaxSumInputs = 4;
inline constexpr std::int64_t kMaxLaneInputs = 64;
bool has_sums_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept;
std::int64_t sums_width_avx512bf16(const KernelMatrix& w) noexcept;
void pack_sums_avx512bf16(const KernelMatrix& w, const std::uint16_t* in,
                          std::uint16_t* out) noexcept;
void matmul_sums_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_begin,
                            std::int64_t row_end) noexcept;
bool has_lanes_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept;
Bf16Tiles lane_tiles_avx512bf16(const KernelMatrix& w, std::int64_t inputs) noexcept;
void pack_lanes_avx512bf16(const KernelMatrix& w, const std::uint16_t* in, std::int64_t rows,
                           std::uint16_t* out) noexcept;
void matmul_lanes_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_begin,
                             std::int64_t row_end) noexcept;
/// matmul of up to 11 inputs where step_fields is not 0, 4 rows at a time; returns the first row
/// left.
std::int64_t matmul_direct_avx512bf16(const KernelMatrix& w, const Bf16Job& job,
                                      std::int64_t row_begin, std::int64_t row_end) noexcept;
void matmul_panels_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t row_begin,
                              std::int64_t row_end) noexcept;
void matmul_transposed_avx512bf16(const KernelMatrix& w, const Bf16Job& job, std::int64_t col_begin,
                                  std::int64_t col_end) noexcept;
const Bf16Kernels& bf16_kernels_avx512bf16();
void dequantize_avx512bf16(const KernelMatrix& w, const DequantizeJob& job) noexcept;

/// float32 that a Bf16Job's scratch holds for a thread: 512 KiB, too much for some stacks.
inline constexpr std::int64_t kBf16ScratchFloats = 128 * 1024;

/// Rows of activations up to which a packed product is chosen, by FloatKind of the activations.
struct MaxRows {
  int rows[3];
};

/// One instruction set's kernels.
struct CpuKernels {
  const char* name;
  bool (*supported)() noexcept;  ///< can this machine run them
  void (*dequantize)(const KernelMatrix& w, const DequantizeJob& job) noexcept;
  /// Output rows [row_begin, row_end).
  void (*matmul)(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,
                 std::int64_t row_end) noexcept;
  /// Output columns [col_begin, col_end); col_begin is a multiple of 16.
  void (*matmul_transposed)(const KernelMatrix& w, const TransposedJob& job, std::int64_t col_begin,
                            std::int64_t col_end) noexcept;
  /// n elements of `kind` to float32, exact.
  void (*widen)(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept;
  const Int8Kernels& (*int8)();     ///< int8_kernels.h
  const IntKernels& (*integers)();  ///< int_kernels.h
  const Bf16Kernels& (*bf16)();     ///< null: 16-bit activations are widened to float32
  const FewRowsAttention& (*few_rows_attention)();  ///< attention_kernels.h
  const BlockAttention& (*block_attention)();       ///< null: the framework's
  const LowRankKernels& (*low_rank)();              ///< low_rank_kernels.h
  MaxRows max_rows, transposed_max_rows;            ///< packed_matmul_max_rows
};

#define QUANTAL_DECLARE_KERNELS(isa)                                                               \
  void decode_##isa(const KernelMatrix& w, std::int64_t row, std::int64_t col, std::int64_t count, \
                    float* out) noexcept;                                                          \
  void dequantize_##isa(const KernelMatrix& w, const DequantizeJob& job) noexcept;                 \
  void matmul_##isa(const KernelMatrix& w, const MatmulJob& job, std::int64_t row_begin,           \
                    std::int64_t row_end) noexcept;                                                \
  void matmul_transposed_##isa(const KernelMatrix& w, const TransposedJob& job,                    \
                               std::int64_t col_begin, std::int64_t col_end) noexcept;             \
  void widen_##isa(FloatKind kind, const void* in, std::int64_t n, float* out) noexcept;

QUANTAL_DECLARE_KERNELS(scalar)
QUANTAL_DECLARE_KERNELS(avx2)
QUANTAL_DECLARE_KERNELS(avx512)
QUANTAL_DECLARE_KERNELS(neon)
#undef QUANTAL_DECLARE_KERNELS

}  // namespace quantal

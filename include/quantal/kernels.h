// quantal kernels: the packed matrix, the one in-memory form on which all arithmetic runs.
//
// A stored weight is  code map x scale source x offset  (docs/concepts.md). Dialects differ in how
// codes and statistics are chosen, named and serialized; kernels see only this form.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "quantal/core.h"

namespace quantal {

/// What a code stands for before scaling.
enum class CodeMap : std::uint8_t {
  kInteger = 0,  ///< value = code - centre
  kNf4 = 1,      ///< table kNf4Codebook
  kFp4 = 2,      ///< table kFp4Codebook
  kTable = 3,    ///< 16 float32 at the start of `shared`
  kE2M1 = 4,     ///< table kE2M1Codebook (OCP MX, 4 bits)
  kIq4Nl = 5,    ///< table kIq4NlCodebook (ggml)
  kE4M3 = 6,     ///< 8-bit float, finite up to 448, 0x7F and 0xFF NaN (OCP E4M3)
  kE5M2 = 7,     ///< 8-bit float, IEEE-like with infinities
};

/// How the offset enters. c = mapped code, s = scale; r() rounds to value_dtype after each step,
/// every step computed in float32.
enum class Offset : std::uint8_t {
  kNone = 0,       ///< w = r(c * s)
  kBias = 1,       ///< w = r(r(c * s) + b)      weight units
  kShift = 2,      ///< w = r(r(s * c) - shift)  weight units
  kZeroPoint = 3,  ///< w = r(r(c - z) * s)      code units
  kOver127 = 4,    ///< w = r(r(c * s) * kInverse127), nothing stored: s is a row's largest weight
};
inline constexpr float kInverse127 = 1.0F / 127.0F;
/// True if a matrix stores one offset beside each scale (all but kNone and kOver127).
constexpr bool stores_offsets(Offset o) { return o != Offset::kNone && o != Offset::kOver127; }

/// Where a scale comes from.
enum class ScaleSource : std::uint8_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kNestedU8 = 3,  ///< scale = map[u8] * absmax2[block / nested_group_size] + nested_offset
  kE8M0 = 4,      ///< one byte: scale = r(2^(u8 - 127))
  kE4M3 = 5,      ///< one byte: scale = r(E4M3 float)
  // Two levels, GGUF's super-blocks: scale = float(super) * sub, offset = float(super_offset) * sub
  // offset in float32; supers are f16, one per nested_group_size groups; whole super-blocks per
  // row.
  kSuperU8 = 6,  ///< sub-scales and sub-offsets are u8
  kSuperI8 = 7,  ///< sub-scales are i8
  kSuperU4 = 8,  ///< one byte holds both: sub-scale in the low nibble, sub-offset in the high one
};

/// Which weights share one scale.
enum class GroupMap : std::uint8_t {
  /// Runs of group_size consecutive elements of the flattened matrix; a run may cross rows.
  kRowRuns = 0,
  /// Element i (flattened) uses statistic i mod (rows * cols / group_size): HQQ axis 0.
  kColumnRuns = 1,
  /// Element (r, c) uses statistic (r / group_size) * cols + c; rows % group_size == 0: Quanto axis
  /// -1.
  kColumnBlocks = 2,
};

/// The NF4 and FP4 tables (bitsandbytes 0.50.2), indexed by code. FP4 code 8 is +0.
extern const std::array<float, 16> kNf4Codebook;
extern const std::array<float, 16> kFp4Codebook;
/// OCP MX E2M1: 0 .5 1 1.5 2 3 4 6 and their negatives (code 8 is -0).
extern const std::array<float, 16> kE2M1Codebook;
/// ggml's non-linear 4-bit table, -127 .. 113.
extern const std::array<float, 16> kIq4NlCodebook;
/// Values of the 8-bit float formats, exact in float32, indexed by code.
extern const std::array<float, 256> kE4M3Values;
extern const std::array<float, 256> kE5M2Values;

/// Everything a kernel must know about a packed matrix. Plain values; stored as kSpecInts integers.
struct PackedSpec {
  std::int64_t rows = 0;  ///< product of all dimensions but the last
  std::int64_t cols = 0;  ///< last dimension (in_features)
  int bits = 4;           ///< width of a code: 1, 2, 3, 4, 5, 6 or 8
  CodeMap code_map = CodeMap::kInteger;
  int centre = 0;  ///< integer maps: subtracted from the code
  Offset offset = Offset::kNone;
  ScaleSource scale = ScaleSource::kF32;  ///< storage of scale and offset
  DType value_dtype = DType::kF32;        ///< each step of a value is rounded to this
  GroupMap group_map = GroupMap::kRowRuns;
  std::int64_t group_size = 64;          ///< codes per scale, 1 .. 2^24 - 1
  std::int64_t nested_group_size = 256;  ///< scales per absmax2 or super (<= 256)
  int dialect = 0;                       ///< id of the dialect that wrote it (formats.h)
  std::int64_t dialect_flags = 0;        ///< dialect's own facts, never read by kernels
  std::int64_t residue_bytes = 0;        ///< bytes at the end of `shared` for the dialect's writer

  bool operator==(const PackedSpec&) const = default;
};

inline constexpr std::size_t kSpecInts = 16;
inline constexpr std::int64_t kLayoutVersion = 1;
/// Version first, then the members in order, then zeros.
std::array<std::int64_t, kSpecInts> spec_to_ints(const PackedSpec& spec);
/// Inverse; throws Error{kCorrupt} for an unknown version, length or enumerator and what
/// validate_spec throws.
PackedSpec spec_from_ints(std::span<const std::int64_t> ints);
/// Throws Error{kConfig} or Error{kShape} naming the member if no kernel could run on `spec`.
void validate_spec(const PackedSpec& spec);

/// Sizes of the three buffers that follow from a spec.
///
/// codes   [rows, code_bytes]. A plane of b bits (1, 2, 4, 8) is made of strips of 16 bytes, each
///         holding 128 / b consecutive codes of one row; byte j, bit field f (low first) is code
///         16 f + j of the strip. Widths 3, 5, 6 are two planes, low bits first, interleaved by
///         unit: 3 = 2 + 1 and 5 = 4 + 1 in units of 128 codes (48 and 80 bytes), 6 = 4 + 2 in
///         units of 64 codes (48 bytes). Rows are padded with zero codes to whole units.
/// stats   kRowRuns: [rows, stat_bytes], a row is
///           u32 header (little endian, only if has_header):
///             bits 0..23  phase = flat index of the row's first element mod group_size
///             bits 24..31 nested phase = index of the row's first block mod nested_group_size
///           `slots` scales, then `slots` offsets (if stores_offsets), each in the scale's storage
///           type; kNestedU8: `slots` u8 codes, then `nested_slots` float32 absmax2. kSuper*:
///           `slots` sub-scale bytes, `slots` sub-offset bytes (not kSuperU4), then `nested_slots`
///           f16 supers and, if stores_offsets, as many f16 super-offsets.
///           Slot k holds the statistics of the k-th group that the row touches; where groups cross
///           rows both rows hold them. Unused slots are zero.
///         kColumnRuns: [rows * cols / group_size, scale bytes + offset bytes], scale first;
///         kColumnBlocks the same.
/// shared  kTable: 16 float32; kNestedU8: float32 nested_offset, then 256 float32 map; then
///         residue_bytes that only the dialect's writer reads. In this order, absent parts empty.
struct PackedLayout {
  std::int64_t code_bytes = 0;
  std::int64_t stat_rows = 0;
  std::int64_t stat_bytes = 0;
  std::int64_t shared_bytes = 0;
  std::int64_t slots = 0;         ///< groups that a row can touch (kRowRuns)
  std::int64_t nested_slots = 0;  ///< second-level blocks that a row can touch (kNestedU8)
  bool has_header = false;        ///< cols % group_size != 0 or kNestedU8 (kRowRuns)
  std::int64_t total_bytes(const PackedSpec& spec) const;
};
/// Throws what validate_spec throws.
PackedLayout layout_of(const PackedSpec& spec);

/// A borrowed packed matrix.
struct PackedView {
  PackedSpec spec;
  std::span<const std::uint8_t> codes, stats, shared;
};

/// A packed matrix that owns its bytes.
struct PackedMatrix {
  PackedSpec spec;
  std::vector<std::uint8_t> codes, stats, shared;
  PackedView view() const { return {spec, codes, stats, shared}; }
};
/// Zero-filled buffers of the right sizes.
PackedMatrix make_packed(const PackedSpec& spec);
/// Throws Error{kShape} if a buffer's size differs from layout_of(spec).
void check_packed(const PackedView& w);

// ------------------------------------------------------------------ moving codes and statistics

/// Codes per unit of `bits`: 16 (8), 32 (4), 64 (2, 6), 128 (1, 3, 5); and bytes of a unit.
std::int64_t unit_codes(int bits);
std::int64_t unit_bytes(int bits);

/// Packs one row: `codes[c]` (one code per byte, each < 2^bits) into `out` (code_bytes).
void pack_row(int bits, const std::uint8_t* codes, std::int64_t cols, std::uint8_t* out);
/// Inverse of pack_row.
void unpack_row(int bits, const std::uint8_t* packed, std::int64_t cols, std::uint8_t* codes);

/// Statistics of one row, spread from flat group arrays into the row's slots (kRowRuns).
/// `scales` and `offsets` hold raw storage elements of the whole matrix, indexed by
/// flat element / group_size; for kNestedU8 `scales` holds u8 codes and `absmax2` float32 by
/// group / nested_group_size; for kSuper* `supers` and `super_offsets` hold f16 by the same index.
/// `offsets` is null unless stores_offsets (and for kSuperU4). `first_row` is the index of row
/// 0 of `spec` in the matrix that the flat arrays describe.
struct FlatStats {
  const std::uint8_t* scales = nullptr;
  const std::uint8_t* offsets = nullptr;
  const float* absmax2 = nullptr;
  const std::uint16_t* supers = nullptr;
  const std::uint16_t* super_offsets = nullptr;
};
void spread_stats(const PackedSpec& spec, const FlatStats& flat, std::int64_t first_row,
                  std::uint8_t* stats, const Executor& executor);

/// Inverse of spread_stats over a whole matrix (first_row 0). Throws Error{kCorrupt} naming row and
/// group if two rows disagree about a group they share.
struct GatheredStats {
  std::vector<std::uint8_t> scales, offsets;
  std::vector<float> absmax2;
  std::vector<std::uint16_t> supers, super_offsets;
};
GatheredStats gather_stats(const PackedView& w);

// ------------------------------------------------------------------ arithmetic

/// A rectangle of the matrix: rows [row_begin, row_end) x columns [col_begin, col_end).
struct Panel {
  std::int64_t row_begin = 0, row_end = 0, col_begin = 0, col_end = 0;
};

/// Exact values: `out[(r - row_begin) * ld + (c - col_begin)] = out_dtype(w(r, c))`, w as defined
/// at Offset. `ld` is in elements. col_begin must be a multiple of 128. out_dtype kF32, kF16 or
/// kBF16. Bit-identical on every ISA and for every thread count. Throws Error{kShape} /
/// Error{kDtype}.
void dequantize(const PackedView& w, const Panel& panel, DType out_dtype, void* out,
                std::int64_t ld, const Executor& executor);

/// True if `matmul` and `matmul_transposed` run straight from packed codes for this spec
/// (kRowRuns); otherwise use panels.
bool supports_packed_matmul(const PackedSpec& spec) noexcept;
/// Rows of activations up to which the packed product is expected to beat panels, from the measured
/// table of the active ISA.
std::int64_t packed_matmul_max_rows(const PackedSpec& spec, DType x_dtype) noexcept;

/// `y[m, n] = sum_k x[m, k] * w(n, k) (+ bias[n])`, accumulated in float32 with a summation order
/// that depends on nothing but the shapes. x [m_rows, cols] and y [m_rows, rows] row-major and
/// contiguous, both of `dtype`; bias float32 of `rows` or null. |error| <= 8 * sqrt(cols) * 2^-24 *
/// sum|x||w| + rounding of y to dtype.
void matmul(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows, const float* bias,
            void* y, const Executor& executor);

/// `y[m, k] = sum_n g[m, n] * w(n, k)`, the product of the backward pass. g [m_rows, rows],
/// y [m_rows, cols]. Same contract as matmul.
void matmul_transposed(const PackedView& w, DType dtype, const void* g, std::int64_t m_rows,
                       void* y, const Executor& executor);

/// The product of LLM.int8 (Dettmers et al., 2022): activations to f16, entries with |a| >=
/// threshold (threshold > 0) are outliers and go through dequantized weights, the rest through int8
/// by row. w: 8 bits, kOver127, one group per row. Integers are exact; with threshold 0 the result
/// has the bits of bitsandbytes' portable kernel, its rounded constant included
/// (docs/formats/bnb.md).
void matmul_int8(const PackedView& w, DType dtype, const void* x, std::int64_t m_rows,
                 const float* bias, float threshold, void* y, const Executor& executor);

// ------------------------------------------------------------------ dispatch

/// Name of the kernel set in use: "scalar", "avx2", "avx512" or "neon". The environment variable
/// QUANTAL_CPU forces one; an unknown or unsupported value is Error{kDevice} on first use.
std::string_view active_cpu_kernels();
/// All sets that this machine can run, best first.
std::vector<std::string_view> available_cpu_kernels();
/// Switches the process to a named set (tests, benchmarks). Throws Error{kDevice}.
void select_cpu_kernels(std::string_view name);

}  // namespace quantal

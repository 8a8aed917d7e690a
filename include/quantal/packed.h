// quantal packed: the one in-memory form of a quantized matrix. Part of the room kernels, whose
// arithmetic (quantal/kernels.h) runs on it.
//
// A stored weight is  code map x scale source x offset  (docs/concepts.md). Dialects differ in how
// codes and statistics are chosen, named and serialized; kernels see only this form.
#pragma once

#include <array>
#include <cstdint>
#include <span>
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
inline constexpr float kInverse127 = 1.0F / 127.0F;  ///< as bitsandbytes rounds it
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

/// The NF4 table (bitsandbytes 0.50.2), indexed by code.
extern const std::array<float, 16> kNf4Codebook;
/// The FP4 table (bitsandbytes 0.50.2), indexed by code. Code 8 is +0.
extern const std::array<float, 16> kFp4Codebook;
/// OCP MX E2M1: 0 .5 1 1.5 2 3 4 6 and their negatives (code 8 is -0).
extern const std::array<float, 16> kE2M1Codebook;
/// ggml's non-linear 4-bit table, -127 .. 113.
extern const std::array<float, 16> kIq4NlCodebook;
/// Values of E4M3, exact in float32, indexed by code.
extern const std::array<float, 256> kE4M3Values;
/// Values of E5M2, exact in float32, indexed by code.
extern const std::array<float, 256> kE5M2Values;

/// Everything a kernel must know about a packed matrix. Plain values; stored as kSpecInts integers.
struct PackedSpec {
  std::int64_t rows = 0;                    ///< product of all dimensions but the last
  std::int64_t cols = 0;                    ///< last dimension (in_features)
  int bits = 4;                             ///< width of a code: 1, 2, 3, 4, 5, 6 or 8
  CodeMap code_map = CodeMap::kInteger;     ///< what a code means
  int centre = 0;                           ///< integer maps: subtracted from the code
  Offset offset = Offset::kNone;            ///< what is added
  ScaleSource scale = ScaleSource::kF32;    ///< storage of scale and offset
  DType value_dtype = DType::kF32;          ///< each step of a value is rounded to this
  GroupMap group_map = GroupMap::kRowRuns;  ///< which codes share a scale
  std::int64_t group_size = 64;             ///< codes per scale, 1 .. 2^24 - 1
  std::int64_t nested_group_size = 256;     ///< scales per absmax2 or super (<= 256)
  int dialect = 0;                          ///< id of the dialect that wrote it (formats.h)
  std::int64_t dialect_flags = 0;           ///< dialect's own facts, never read by kernels
  std::int64_t residue_bytes = 0;  ///< bytes at the end of `shared` for the dialect's writer

  bool operator==(const PackedSpec&) const = default;  ///< memberwise
};

inline constexpr std::size_t kSpecInts = 16;       ///< integers of a stored spec
inline constexpr std::int64_t kLayoutVersion = 1;  ///< first of them
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
  std::int64_t code_bytes = 0;    ///< of a row
  std::int64_t stat_rows = 0;     ///< rows of statistics
  std::int64_t stat_bytes = 0;    ///< of a row of statistics
  std::int64_t shared_bytes = 0;  ///< of the whole matrix
  std::int64_t slots = 0;         ///< groups that a row can touch (kRowRuns)
  std::int64_t nested_slots = 0;  ///< second-level blocks that a row can touch (kNestedU8)
  bool has_header = false;        ///< cols % group_size != 0 or kNestedU8 (kRowRuns)
  std::int64_t total_bytes(const PackedSpec& spec) const;  ///< codes, statistics and shared
};
/// Throws what validate_spec throws.
PackedLayout layout_of(const PackedSpec& spec);

/// A borrowed packed matrix.
struct PackedView {
  PackedSpec spec;                       ///< what the bytes mean
  std::span<const std::uint8_t> codes;   ///< layout_of(spec)
  std::span<const std::uint8_t> stats;   ///< layout_of(spec)
  std::span<const std::uint8_t> shared;  ///< layout_of(spec)
};

/// A packed matrix that owns its bytes.
struct PackedMatrix {
  PackedSpec spec;                                                  ///< what the bytes mean
  std::vector<std::uint8_t> codes;                                  ///< layout_of(spec)
  std::vector<std::uint8_t> stats;                                  ///< layout_of(spec)
  std::vector<std::uint8_t> shared;                                 ///< layout_of(spec)
  PackedView view() const { return {spec, codes, stats, shared}; }  ///< borrowed
};
/// Rows [begin, end).
struct RowRange {
  std::int64_t begin = 0;                            ///< first row
  std::int64_t end = 0;                              ///< behind the last row
  std::int64_t size() const { return end - begin; }  ///< rows
  bool operator==(const RowRange&) const = default;  ///< memberwise
};
/// A part of a packed matrix. Which statistics it has is said by what makes it.
struct PackedRows {
  std::vector<std::uint8_t> codes;   ///< [rows of the part, code_bytes]
  std::vector<std::uint8_t> stats;   ///< [rows of statistics, stat_bytes]
  std::vector<std::uint8_t> shared;  ///< that of the whole matrix
};

/// Zero-filled buffers of the right sizes.
PackedMatrix make_packed(const PackedSpec& spec);
/// Throws Error{kShape} if a buffer's size differs from layout_of(spec).
void check_packed(const PackedView& w);

// ------------------------------------------------------------------ moving codes and statistics

/// Codes per unit of `bits`: 16 (8), 32 (4), 64 (2, 6), 128 (1, 3, 5).
std::int64_t unit_codes(int bits);
/// Bytes of such a unit.
std::int64_t unit_bytes(int bits);

/// Packs one row: `codes[c]` (one code per byte, each < 2^bits) into `out` (code_bytes).
void pack_row(int bits, const std::uint8_t* codes, std::int64_t cols, std::uint8_t* out);
/// Inverse of pack_row.
void unpack_row(int bits, const std::uint8_t* packed, std::int64_t cols, std::uint8_t* codes);

/// Statistics of a matrix as flat arrays, one entry per group (kRowRuns).
/// `scales` and `offsets` hold raw storage elements of the whole matrix, indexed by
/// flat element / group_size; for kNestedU8 `scales` holds u8 codes and `absmax2` float32 by
/// group / nested_group_size; for kSuper* `supers` and `super_offsets` hold f16 by the same index.
/// `offsets` is null unless stores_offsets (and for kSuperU4).
struct FlatStats {
  const std::uint8_t* scales = nullptr;          ///< one per group
  const std::uint8_t* offsets = nullptr;         ///< one per group
  const float* absmax2 = nullptr;                ///< second level
  const std::uint16_t* supers = nullptr;         ///< of blocks
  const std::uint16_t* super_offsets = nullptr;  ///< of blocks
};
/// Spreads flat statistics into the slots of the rows of `spec` (kRowRuns). `first_row` is the
/// index of row 0 of `spec` in the matrix that the flat arrays describe.
void spread_stats(const PackedSpec& spec, const FlatStats& flat, std::int64_t first_row,
                  std::uint8_t* stats, const Executor& executor);

/// FlatStats that own their arrays.
struct GatheredStats {
  std::vector<std::uint8_t> scales;          ///< one per group
  std::vector<std::uint8_t> offsets;         ///< one per group
  std::vector<float> absmax2;                ///< second level
  std::vector<std::uint16_t> supers;         ///< of blocks
  std::vector<std::uint16_t> super_offsets;  ///< of blocks
};
/// Inverse of spread_stats over a whole matrix (first_row 0). Throws Error{kCorrupt} naming row and
/// group if two rows disagree about a group they share.
GatheredStats gather_stats(const PackedView& w);

}  // namespace quantal

// Quanto: types, the group rule, and the facts that a packed spec keeps for the writer.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "quantal/formats.h"

namespace quantal::quanto {

inline constexpr int kDialectId = 4;
inline constexpr std::array<int, 3> kBits = {2, 4, 8};
/// Codes of qint8 are stored with this added.
inline constexpr int kInt8Centre = 128;
/// Rounds of the half-quadratic optimizer behind the first evaluation.
inline constexpr int kSolverRounds = 20;
/// What float8 rows of scale 0 hold upstream: 0 / 0 converted to float8.
inline constexpr std::uint8_t kUpstreamNan = 0xFF;

/// Upstream's element types; the values are stored in Flags.
enum class QType : std::uint8_t {
  kNone = 0,
  kInt2 = 1,
  kInt4 = 2,
  kInt8 = 3,
  kFloat8E4M3 = 4,
  kFloat8E5M2 = 5,
  kFloat8E4M3Fnuz = 6,
};
/// "none", "qint2" ..., as quanto_qmap.json spells them.
std::string_view qtype_name(QType type) noexcept;
/// Inverse; also reads "qfloat8" (e4m3fn) and transformers' "int4", "float8". Empty if unknown.
std::optional<QType> find_qtype(std::string_view name) noexcept;
/// The type of the codes of a packed matrix of this dialect.
QType qtype_of(const PackedSpec& spec) noexcept;
int bits_of(QType type) noexcept;  ///< 2, 4 or 8; 0 for kNone

/// Group size of upstream's modules for 2- and 4-bit codes, where `length` weights share an index
/// of the axis: none (0) up to 128, else the first of 128, 96, 64, 32 that divides. No file stores
/// a group size, so upstream loads no other.
std::int64_t upstream_group_size(std::int64_t length) noexcept;

/// PackedSpec::dialect_flags of this dialect.
struct Flags {
  bool zero_point = false;       ///< bit 0: _shift is uint8, in codes
  bool per_tensor = false;       ///< bit 1: one 0-dim scale, repeated for every row here
  bool optimize = false;         ///< bit 2: half-quadratic optimizer
  bool no_input_scale = false;   ///< bit 3: the layer has no tensor input_scale
  bool no_output_scale = false;  ///< bit 4
  bool nan_rows = false;         ///< bit 5: float8 codes of zero scales are kUpstreamNan in files
  QType activations = QType::kNone;  ///< bits 8..11

  std::int64_t to_int() const {
    return (zero_point ? 1 : 0) | (per_tensor ? 2 : 0) | (optimize ? 4 : 0) |
           (no_input_scale ? 8 : 0) | (no_output_scale ? 16 : 0) | (nan_rows ? 32 : 0) |
           (static_cast<std::int64_t>(activations) << 8);
  }
  static Flags from_int(std::int64_t bits) {
    return {(bits & 1) != 0,
            (bits & 2) != 0,
            (bits & 4) != 0,
            (bits & 8) != 0,
            (bits & 16) != 0,
            (bits & 32) != 0,
            static_cast<QType>((bits >> 8) & 15)};
  }
};

/// The 2-D matrix of codes that upstream packs. Axis 0: the weight as [numel / g, g], its rows are
/// the groups. Axis -1: [g, columns], column c * blocks + b is column c of row block b.
struct Grouped {
  bool columns = false;
  std::int64_t rows = 0, cols = 0;
  std::int64_t blocks = 1;       ///< row blocks of the weight (axis -1)
  std::int64_t packed_rows = 0;  ///< rows of the stored bytes
};
/// For 2- and 4-bit specs. A single row of groups of one weight each counts as axis -1.
Grouped grouped_of(const PackedSpec& spec);

}  // namespace quantal::quanto

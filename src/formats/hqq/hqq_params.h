// HQQ: parameters and the facts that a packed spec keeps for the writer.
#pragma once

#include <array>
#include <cstdint>

#include "quantal/formats.h"

namespace quantal::hqq {

inline constexpr int kDialectId = 2;
inline constexpr std::array<int, 2> kBits = {4, 8};
/// Group sizes that a quantizer accepts are multiples of this (upstream's configuration helper).
inline constexpr std::int64_t kGroupMultiple = 8;
/// Rounds of the half-quadratic solver.
inline constexpr int kSolverRounds = 20;
/// Groups with a smaller range get scale 1; the inverse scale never exceeds kMaxInverseScale.
inline constexpr float kTinyRange = 1e-4F;
inline constexpr float kMaxInverseScale = 2e4F;

/// PackedSpec::dialect_flags of this dialect: the weight settings that its files repeat.
struct Flags {
  bool optimize = true;        ///< bit 0
  bool round_zero = false;     ///< bit 1
  bool channel_wise = true;    ///< bit 2; false: one scale for the whole matrix
  bool view_as_float = false;  ///< bit 3: W_q stored as compute_dtype
  bool offload_meta = false;   ///< bit 4
  /// Bits 8 and up: group_size in the file where it is not the real one (channel_wise false).
  std::int64_t stored_group_size = 0;

  std::int64_t to_int() const {
    return (optimize ? 1 : 0) | (round_zero ? 2 : 0) | (channel_wise ? 4 : 0) |
           (view_as_float ? 8 : 0) | (offload_meta ? 16 : 0) | (stored_group_size << 8);
  }
  static Flags from_int(std::int64_t bits) {
    return {(bits & 1) != 0, (bits & 2) != 0,  (bits & 4) != 0,
            (bits & 8) != 0, (bits & 16) != 0, bits >> 8};
  }
};

/// Matrix of groups that upstream works on: the flattened weights as [rows, cols]; groups are its
/// rows (axis 1) or its columns (axis 0).
struct Grouping {
  std::int64_t rows = 0, cols = 0, groups = 0;
};
Grouping grouping_of(const PackedSpec& spec);

}  // namespace quantal::hqq

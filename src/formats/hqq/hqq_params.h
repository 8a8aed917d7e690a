// HQQ: parameters and the facts that a packed spec keeps for the writer.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "quantal/formats.h"

namespace quantal::hqq {

inline constexpr int kDialectId = 2;
inline constexpr std::array<int, 7> kBits = {1, 2, 3, 4, 5, 6, 8};
/// Group sizes that a quantizer accepts are multiples of this (upstream's configuration helper).
inline constexpr std::int64_t kGroupMultiple = 8;
/// Rounds of the half-quadratic solver.
inline constexpr int kSolverRounds = 20;
/// Groups with a smaller range get scale 1; the inverse scale never exceeds kMaxInverseScale.
inline constexpr float kTinyRange = 1e-4F;
inline constexpr float kMaxInverseScale = 2e4F;
/// Width of quantized scales and zeros.
inline constexpr int kMetaBits = 8;
/// Codes 0, 1, 2 in 2-bit fields: `nbits` 1.58 upstream, QuantizeOptions::mode "1.58" with bits 2.
inline constexpr std::string_view kTernaryMode = "1.58";
inline constexpr float kTernaryBits = 1.58F;

/// PackedSpec::dialect_flags of this dialect: what its files say beyond codes and statistics.
struct Flags {
  bool optimize = true;        ///< bit 0
  bool round_zero = false;     ///< bit 1
  bool channel_wise = true;    ///< bit 2; false: one scale for the whole matrix
  bool view_as_float = false;  ///< bit 3: W_q stored as view_dtype
  bool offload_meta = false;   ///< bit 4
  bool quant_zero = false;     ///< bit 5: zeros are stored quantized (in the residue)
  bool quant_scale = false;    ///< bit 6: scales are
  bool stacked = false;        ///< bit 7: zero and scale are one tensor, zero_scale
  /// Bits 8 to 39: group_size in the file where it is not the real one (channel_wise false).
  std::int64_t stored_group_size = 0;
  bool ternary = false;            ///< bit 40: nbits 1.58
  bool no_group_size = false;      ///< bit 41: group_size None
  bool along_columns = false;      ///< bit 42: axis 0 with channel_wise false
  bool no_settings = false;        ///< bit 43: no channel_wise, optimize, round_zero
  bool no_view_facts = false;      ///< bit 44: no view_as_float, unpack_view_dtype
  bool no_offload_meta = false;    ///< bit 45
  bool unpacked = false;           ///< bit 46: packing None, W_q holds codes as view_dtype
  DType view_dtype = DType::kF32;  ///< bits 48 to 55

  std::int64_t to_int() const;
  static Flags from_int(std::int64_t bits);
};

/// Matrix of groups that upstream works on: the flattened weights as [rows, cols]; groups are its
/// rows (axis 1) or its columns (axis 0). With channel_wise false the weight itself.
struct Grouping {
  std::int64_t rows = 0, cols = 0, groups = 0;
};
Grouping grouping_of(const PackedSpec& spec);

/// Largest code: 2^bits - 1; 2 for ternary codes.
float max_code_of(const PackedSpec& spec);

}  // namespace quantal::hqq

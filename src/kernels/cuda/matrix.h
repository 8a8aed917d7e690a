// A packed matrix as kernels of a device take it: plain values and device pointers.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/device.h"
#include "quantal/packed.h"

namespace quantal::cuda {

/// n / divisor by a product, for n < 2^31 (Granlund and Montgomery, "Division by Invariant Integers
/// using Multiplication", 1994).
struct Divider {
  std::uint32_t divisor = 1, multiplier = 1;
  int shift = 0;

  QUANTAL_HD std::uint32_t quotient(std::uint32_t n) const {
    const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) * multiplier >> 32);
    return (high + n) >> shift;
  }
};
/// 1 <= divisor < 2^31.
Divider divider_of(std::int64_t divisor);

/// What a code is before scaling.
enum class Values : int { kNumber, kTable, kE4M3, kE5M2 };

/// A checked packed matrix (the layout is that of quantal/packed.h). Passed to kernels by value.
struct Matrix {
  const std::uint8_t* codes = nullptr;
  const std::uint8_t* stats = nullptr;
  const float* table = nullptr;   ///< of the matrix itself (CodeMap::kTable), else null
  const float* nested = nullptr;  ///< nested offset, then the map of 256; else null
  std::int64_t rows = 0, cols = 0, code_bytes = 0, stat_bytes = 0;
  std::int64_t column_stats = 0;                  ///< column runs: number of statistics
  std::uint32_t slots = 0, nested_slots = 0;      ///< of a row
  std::uint32_t last_phase = 0, last_nested = 0;  ///< largest phases that stay inside a row
  Divider group, nested_group;
  int bits = 0;
  Values values = Values::kNumber;
  GroupKind groups = GroupKind::kRowRuns;
  OffsetKind offset = OffsetKind::kNone;
  ScaleKind scale = ScaleKind::kF32;
  FloatKind value_kind = FloatKind::kF32;
  bool has_header = false, has_offsets = false;
  float centre = 0;      ///< numbers: value = code - centre
  float fixed[16] = {};  ///< table of the code map where `table` is null
};

/// Largest columns + group_size of a Matrix: positions in a row are 32-bit.
inline constexpr std::int64_t kMaxPositions = (std::int64_t{1} << 31) - 1;

/// The matrix of a view whose spans are device memory: nothing is read through them. Throws what
/// check_packed throws, and Error{kUnsupported} for rows beyond kMaxPositions or buffers that are
/// not aligned: codes to 16 bytes, statistics and shared to 4.
Matrix matrix_of(const PackedView& w);

/// True if no run of 16 columns holds a border of groups and rows are whole runs: what the products
/// need. Others go through dequantize.
bool whole_chunks(const PackedSpec& spec) noexcept;

}  // namespace quantal::cuda

// quantal shards: quantizing some rows of a matrix so that the parts of several ranks together have
// the bytes of the whole. Part of the room formats.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"
#include "quantal/kernels.h"

namespace quantal {

/// Weights of a matrix, a few rows at a time.
struct RowSource {
  DType dtype = DType::kF32;  ///< kF32, kF16 or kBF16
  /// Copies rows, row-major, to `out`. Called from one thread.
  std::function<void(RowRange rows, void* out)> read;
};

/// What the ranks that quantize one matrix tell each other: `bytes` holds this rank's values where
/// it has some and zeros elsewhere; on return it holds those of all ranks (a sum, since no two
/// ranks fill the same place). All ranks make the same calls in the same order. It may throw.
using Exchange = std::function<void(std::span<std::uint8_t> bytes)>;

/// Rows that quantizing the rows `part` of a matrix of this form reads, in order:
///
/// | form | rows |
/// |---|---|
/// | groups within rows | `part` |
/// | groups or second-level blocks that cross rows | and neighbours, to the next common border |
/// | kColumnBlocks | and the rest of its row blocks |
/// | kColumnRuns with rows % group_size == 0 | every (rows / group_size)-th row: its groups |
/// | kColumnRuns otherwise; HQQ's quantized zeros and scales | all rows |
///
/// A part without rows reads a few nevertheless where ranks have to keep step.
std::vector<RowRange> rows_to_read(const PackedSpec& whole, RowRange part);

/// Quantizes the rows `part` of a matrix. If every row is in the part of one rank, the bytes of all
/// parts, one after another, are those of Dialect::quantize on the whole matrix, for every cut.
/// Statistics are those of the rows (kRowRuns); where rows share them (kColumnRuns, kColumnBlocks)
/// those of the whole matrix.
///
/// The exchange carries one float64 per row: once for a mean (bitsandbytes' nested offset), once
/// per round for the stopping rule of a solver (HQQ, Quanto); for kColumnRuns also the codes, and
/// the statistics where rows share them. It is not called where the bytes of a row depend on no
/// row outside of rows_to_read. Memory: these rows (panels of 64 MB of them for dialects without
/// quantize_part), and the result.
///
/// Throws Error{kShape} for a part outside of the matrix; what the dialect throws (rows in its
/// messages count from the first row that was read); what `source` and `exchange` throw.
PackedRows quantize_rows(const PackedSpec& whole, RowRange part, const RowSource& source,
                         const Exchange& exchange, const Executor& executor = serial_executor());

/// Rows of rank `rank` of `size` as FSDP cuts them: ceil(rows / size) each, the last ones fewer.
RowRange rank_rows(std::int64_t rows, std::int64_t rank, std::int64_t size);

}  // namespace quantal

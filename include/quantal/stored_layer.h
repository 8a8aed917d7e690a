// quantal stored layers: a quantized layer as its file has it, known but not read yet, and reading
// some rows of it. Part of the room formats.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "quantal/core.h"
#include "quantal/kernels.h"

namespace quantal {

/// Looks a tensor up by full name; nullptr if absent. Views stay valid as long as what was opened
/// on them is used.
using TensorLookup = std::function<const TensorView*(const std::string&)>;

/// What is known about a layer beside its tensors.
struct LayerFacts {
  std::string settings = "{}";  ///< Dialect::read_settings for this layer
  /// Shape of the dense weight where the caller knows it (from the model); empty if not.
  std::vector<std::int64_t> weight_shape{};
};

/// A layer whose tensors were checked against each other, codes and statistics still where the file
/// has them. Of R rows, reading r touches no more of the codes than this:
///
/// | form | codes touched by reading | by opening |
/// |---|---|---|
/// | bitsandbytes, MLX, GGUF, Quanto 8 bits, HQQ 8, 6, 5 bits | r / R | none |
/// | HQQ 4, 3, 2, 1 bits: p = 2, 10, 4, 8 codes a word | min(1, p r / R) | 3 bits: all (1) |
/// | Quanto 4, 2 bits: p = 2, 4 codes a byte | min(1, p r / R) | padding rows |
/// | Quanto float8 | r / R | weights whose scale is 0 (1) |
///
/// (1) what `shared` keeps for the writer depends on them. Statistics: those of the rows that are
/// asked for; a group or second-level block that crosses the border of two rows belongs to both.
/// Read on opening: tables, settings, the second level of bitsandbytes (4 bytes per 256 blocks),
/// scales of Quanto's float8 and its zero points, zeros and scales of HQQ that are quantized
/// themselves (`shared` has them).
struct StoredLayer {
  PackedSpec spec;  ///< of the whole layer
  /// Codes or scales decide about flags or residue_bytes of `spec`: layers that differ in nothing
  /// else can have another one.
  bool spec_from_values = false;
  std::vector<std::uint8_t> shared;  ///< of the whole layer
  /// Codes of rows into `out` [rows.size(), code_bytes]. Throws Error{kCorrupt} for codes, among
  /// these rows, that the form does not have.
  std::function<void(RowRange rows, std::uint8_t* out)> read_codes;
  /// The same for rows of statistics (layout_of(spec).stat_rows) into `out` [.., stat_bytes].
  std::function<void(RowRange rows, std::uint8_t* out)> read_stats;
};

/// Throws Error{kShape} for ranges outside of a layer of this form.
void check_layer_rows(const PackedSpec& spec, RowRange rows, RowRange stat_rows);
/// Codes of `rows`, and rows `stat_rows` of the statistics: the bytes that read_layer has there.
/// Throws what check_layer_rows, read_codes and read_stats throw.
PackedRows read_layer_rows(const StoredLayer& layer, RowRange rows, RowRange stat_rows);
/// All rows. Throws what read_codes and read_stats throw.
PackedMatrix read_layer(const StoredLayer& layer);

}  // namespace quantal

// Statistics of a packed matrix as tensors of its device (the layout is that of quantal/packed.h).
#pragma once

#include <optional>

#include "torch/aten.h"

namespace quantal::stable_ops {

/// Scales and offsets of a block, float32, which broadcast against its values seen as `shape`.
struct [[gnu::visibility("hidden")]] BlockStats {
  Tensor scale;
  std::optional<Tensor> offset;
  Ints shape;
};

class [[gnu::visibility("hidden")]] AtenStats {
 public:
  /// `stats` and `shared` are the checked buffers of `spec`, contiguous.
  AtenStats(const PackedSpec& spec, const Tensor& stats, const Tensor& shared);

  /// Of a block that is not empty; see block_rows.
  BlockStats of(const Panel& block) const;
  /// Rows of the block of `panel` that begins at `row`, of about `weights` weights: groups that
  /// rows share lie in it as a whole, or it lies in one.
  std::int64_t block_rows(const Panel& panel, std::int64_t row, std::int64_t weights) const;
  /// True if statistics are found for whole rows only.
  bool whole_rows() const;
  /// r(v) of quantal::Offset: rounded to the value type.
  Tensor rounded(Tensor v) const;

 private:
  struct Group {
    Tensor scale;
    std::optional<Tensor> offset;
  };

  BlockStats of_row_runs(const Panel& block) const;
  BlockStats of_column_runs(const Panel& block) const;
  BlockStats of_column_blocks(const Panel& block) const;
  Group slots(const Tensor& rows) const;
  Tensor nested(const Tensor& rows) const;
  Group supers(const Tensor& rows) const;
  Group plain(const Tensor& bytes, std::int64_t scales, std::int64_t offsets, std::int64_t count)
      const;
  Tensor elements(const Tensor& bytes, std::int64_t begin, std::int64_t count) const;
  Tensor phases(const Tensor& rows, int shift, std::int64_t mask, std::int64_t last) const;
  Tensor crossed(const Tensor& phase, std::int64_t begin, std::int64_t end, std::int64_t size)
      const;

  PackedSpec spec_;
  PackedLayout layout_;
  Tensor stats_, shared_;
  bool crosses_;  ///< groups run on into the next row
};

/// Values of 8-bit floats: E4M3 (with its NaN) or E5M2.
Tensor small_floats(const Tensor& codes, CodeMap map);
/// `count` elements of `type` at byte `begin` of the last dimension of a tensor of bytes.
Tensor elements_at(const Tensor& bytes, std::int64_t begin, std::int64_t count, ScalarType type);

}  // namespace quantal::stable_ops

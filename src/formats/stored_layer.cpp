#include "quantal/stored_layer.h"

#include <string>
#include <string_view>
#include <utility>

#include "quantal/formats.h"

namespace quantal {
namespace {

void check_range(std::string_view what, RowRange rows, std::int64_t limit) {
  if (rows.begin >= 0 && rows.begin <= rows.end && rows.end <= limit) return;
  fail(Errc::kShape, "read_layer_rows: " + std::string(what) + " are [" +
                         std::to_string(rows.begin) + ", " + std::to_string(rows.end) +
                         "), expected within [0, " + std::to_string(limit) + ")");
}

std::vector<std::uint8_t> buffer(RowRange rows, std::int64_t row_bytes) {
  return std::vector<std::uint8_t>(static_cast<std::size_t>(rows.size() * row_bytes));
}

}  // namespace

void check_layer_rows(const PackedSpec& spec, RowRange rows, RowRange stat_rows) {
  check_range("rows", rows, spec.rows);
  check_range("rows of statistics", stat_rows, layout_of(spec).stat_rows);
}

PackedRows read_layer_rows(const StoredLayer& layer, RowRange rows, RowRange stat_rows) {
  check_layer_rows(layer.spec, rows, stat_rows);
  const PackedLayout layout = layout_of(layer.spec);
  check_size("read_layer_rows: bytes of shared", layer.shared.size(),
             static_cast<std::size_t>(layout.shared_bytes));
  PackedRows out{buffer(rows, layout.code_bytes), buffer(stat_rows, layout.stat_bytes),
                 layer.shared};
  if (rows.size() != 0) layer.read_codes(rows, out.codes.data());
  if (stat_rows.size() != 0) layer.read_stats(stat_rows, out.stats.data());
  return out;
}

PackedMatrix read_layer(const StoredLayer& layer) {
  PackedRows all =
      read_layer_rows(layer, {0, layer.spec.rows}, {0, layout_of(layer.spec).stat_rows});
  return {layer.spec, std::move(all.codes), std::move(all.stats), std::move(all.shared)};
}

PackedMatrix Dialect::import_layer(const std::string& prefix, const TensorLookup& lookup,
                                   const LayerFacts& facts) const {
  return read_layer(open_layer(prefix, lookup, facts));
}

}  // namespace quantal

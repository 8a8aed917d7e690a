// The table that people see before and after a conversion.
#include <algorithm>
#include <cstdio>
#include <map>
#include <tuple>

#include "checkpoint/table.h"
#include "quantal/checkpoint.h"

namespace quantal {
namespace {

using checkpoint::Row;
using Layer = ConvertReport::Layer;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

/// Forms of quantized layers are several words, those of dense weights one: "bf16".
bool is_dense(const std::string& form) { return form.find(' ') == std::string::npos; }

std::string codes_word(const Layer& layer, bool waits) {
  if (is_dense(layer.to)) return "decoded";
  if (!layer.kept.codes) return "new";
  return waits ? "copied if" : "copied";
}

std::string statistics_word(const Layer& layer, double ulp) {
  if (is_dense(layer.from) || is_dense(layer.to)) return "-";
  if (layer.kept.statistics) return "exact";
  return ulp > 0 ? "within " + number(ulp) + " ulp" : "new";
}

std::string values_word(const Preservation& kept) {
  if (!kept.values) return "differ";
  return kept.values_dtype == DType::kF32
             ? "equal"
             : "equal in " + std::string(dtype_name(kept.values_dtype));
}

/// Layers with the same forms and the same statement share a row; measured bounds do not part them.
struct Group {
  Layer first;
  bool waits = false;
  std::int64_t count = 0;
  double error = 0, ulp = 0;
};
using Key = std::tuple<std::string, std::string, std::string, bool, std::string, std::string>;

Key key_of(const Layer& layer, bool waits) {
  return {layer.from,
          layer.to,
          codes_word(layer, waits),
          layer.kept.statistics,
          values_word(layer.kept),
          layer.kept.note};
}

/// A plan cannot look at values.
bool depends_on_values(const Layer& layer) {
  return layer.kept.note.find("depends on the values") != std::string::npos;
}

std::vector<Group> grouped(const ConvertReport& report) {
  std::vector<Group> groups;
  std::map<Key, std::size_t> place;
  for (const Layer& layer : report.layers) {
    const bool waits = !report.measured && depends_on_values(layer);
    const auto [found, fresh] = place.try_emplace(key_of(layer, waits), groups.size());
    if (fresh) groups.push_back({.first = layer, .waits = waits});
    Group& group = groups[found->second];
    ++group.count;
    group.error = std::max(group.error, layer.relative_error);
    group.ulp = std::max(group.ulp, layer.kept.statistics_ulp);
  }
  return groups;
}

}  // namespace

bool ConvertReport::lossless() const {
  return std::all_of(layers.begin(), layers.end(), [this](const Layer& layer) {
    return layer.kept.values && (layer.kept.codes || is_dense(layer.to)) &&
           (measured || !depends_on_values(layer));
  });
}

std::string ConvertReport::text() const {
  std::vector<Row> rows = {{"layers", "from", "to", "codes", "statistics", "values"}};
  if (measured) rows.front().push_back("largest error");
  std::string notes;
  for (const Group& group : grouped(*this)) {
    const Layer& layer = group.first;
    Row row = {std::to_string(group.count),
               layer.from,
               layer.to,
               codes_word(layer, group.waits),
               statistics_word(layer, group.ulp),
               values_word(layer.kept)};
    if (measured) row.push_back(group.error == 0 ? "0" : number(group.error));
    rows.push_back(std::move(row));
    if (!layer.kept.note.empty()) {
      notes += "  " + layer.from + " -> " + layer.to + ": " + layer.kept.note + " (" + layer.name +
               (group.count > 1 ? " ...)\n" : ")\n");
    }
  }
  std::string out = "layout " + layout + "\n";
  if (!layers.empty())
    out += checkpoint::table(rows, {true, false, false, false, false, false, true});
  out += "  " + std::to_string(copied) + " dense tensors are copied as they are\n";
  return notes.empty() ? out : out + "\n" + notes;
}

}  // namespace quantal

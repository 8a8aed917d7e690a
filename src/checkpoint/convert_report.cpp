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

std::string statistics_word(const Preservation& kept) {
  if (kept.statistics) return "exact";
  return kept.statistics_ulp > 0 ? "within " + number(kept.statistics_ulp) + " ulp" : "new";
}

std::string values_word(const Preservation& kept) {
  if (!kept.values) return "differ";
  return kept.values_dtype == DType::kF32
             ? "equal"
             : "equal in " + std::string(dtype_name(kept.values_dtype));
}

/// Layers with the same forms and the same statement share a row.
struct Group {
  std::string name, note;
  std::int64_t count = 0;
  double error = 0;
};
using Key = std::tuple<std::string, std::string, std::string, std::string, std::string>;

Key key_of(const Layer& layer) {
  return {layer.from, layer.to, layer.kept.codes ? "copied" : "new", statistics_word(layer.kept),
          values_word(layer.kept)};
}

}  // namespace

bool ConvertReport::lossless() const {
  return std::all_of(layers.begin(), layers.end(), [](const Layer& layer) {
    return layer.kept.values && (layer.kept.codes || layer.to.find(' ') == std::string::npos);
  });
}

std::string ConvertReport::text() const {
  std::vector<Key> order;
  std::map<Key, Group> groups;
  for (const Layer& layer : layers) {
    const Key key = key_of(layer);
    Group& group = groups[key];
    if (group.count++ == 0) {
      order.push_back(key);
      group.name = layer.name;
      group.note = layer.kept.note;
    }
    group.error = std::max(group.error, layer.relative_error);
  }
  std::vector<Row> rows = {{"layers", "from", "to", "codes", "statistics", "values"}};
  if (measured) rows.front().push_back("largest error");
  std::string notes;
  for (const Key& key : order) {
    const Group& group = groups[key];
    const auto& [from, to, codes, statistics, values] = key;
    Row row = {std::to_string(group.count), from, to, codes, statistics, values};
    if (measured) row.push_back(group.error == 0 ? "0" : number(group.error));
    rows.push_back(std::move(row));
    if (!group.note.empty()) {
      notes += "  " + from + " -> " + to + ": " + group.note + " (" + group.name + ")\n";
    }
  }
  std::string out = "layout " + layout + "\n";
  if (!layers.empty())
    out += checkpoint::table(rows, {true, false, false, false, false, false, true});
  out += "  " + std::to_string(copied) + " dense tensors are copied as they are\n";
  return notes.empty() ? out : out + "\n" + notes;
}

}  // namespace quantal

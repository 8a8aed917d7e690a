#include "quantal/merge_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace quantal {
namespace {

template <class Value>
double weighted_mean(const std::vector<LayerMerge>& layers, Value value) {
  double total = 0, sum = 0;
  for (const LayerMerge& layer : layers) {
    const double weight = layer.delta_norm * layer.delta_norm;
    if (weight <= 0) continue;
    total += weight;
    sum += weight * value(layer);
  }
  return total > 0 ? sum / total : -1;
}

std::string padded(const std::string& text, std::size_t width) {
  return text + std::string(width > text.size() ? width - text.size() : 0, ' ');
}

std::string row_text(const LayerMerge& layer, std::size_t width) {
  const double changed =
      layer.codes > 0 ? static_cast<double>(layer.codes_changed) / static_cast<double>(layer.codes)
                      : 0;
  char figures[64];
  std::snprintf(figures, sizeof(figures), "  %11.2f%%  %9.3f  %5.3f", 100 * changed,
                layer.surviving, layer.noise);
  return padded(layer.name, width) + figures;
}

}  // namespace

std::int64_t MergeReport::codes() const {
  std::int64_t total = 0;
  for (const LayerMerge& layer : layers) total += layer.codes;
  return total;
}

std::int64_t MergeReport::codes_changed() const {
  std::int64_t total = 0;
  for (const LayerMerge& layer : layers) total += layer.codes_changed;
  return total;
}

double MergeReport::surviving() const {
  const double mean = weighted_mean(layers, [](const LayerMerge& l) { return l.surviving; });
  return mean == -1 ? 1 : mean;
}

double MergeReport::noise() const {
  const double mean = weighted_mean(layers, [](const LayerMerge& l) { return l.noise * l.noise; });
  return mean == -1 ? 0 : std::sqrt(mean);
}

std::string MergeReport::to_text() const {
  std::vector<LayerMerge> rows = layers;
  std::ranges::stable_sort(rows, {}, &LayerMerge::surviving);
  rows.push_back({"all", codes(), codes_changed(), 0, surviving(), noise()});
  std::size_t width = 5;
  for (const LayerMerge& layer : rows) width = std::max(width, layer.name.size());
  std::string text = padded("layer", width) + "  codes changed  surviving  noise";
  for (const LayerMerge& layer : rows) text += "\n" + row_text(layer, width);
  return text;
}

std::string MergeReport::to_json() const {
  nlohmann::ordered_json out = {{"codes", codes()},
                                {"codes_changed", codes_changed()},
                                {"surviving", surviving()},
                                {"noise", noise()},
                                {"layers", nlohmann::ordered_json::array()}};
  for (const LayerMerge& layer : layers) {
    out["layers"].push_back({{"name", layer.name},
                             {"codes", layer.codes},
                             {"codes_changed", layer.codes_changed},
                             {"delta_norm", layer.delta_norm},
                             {"surviving", layer.surviving},
                             {"noise", layer.noise}});
  }
  return out.dump();
}

}  // namespace quantal

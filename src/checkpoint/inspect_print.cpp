// The two faces of an Inspection: a table for people and JSON for programs.
#include <algorithm>
#include <cstdio>
#include <map>

#include "checkpoint/inspect.h"
#include "checkpoint/json.h"
#include "checkpoint/table.h"
#include "quantal/checkpoint.h"

namespace quantal {
namespace {

using checkpoint::InspectedTensor;
using checkpoint::Inspection;
using checkpoint::Json;

using checkpoint::printable;
using checkpoint::Row;
using checkpoint::table;

struct Totals {
  std::int64_t tensors = 0, parameters = 0, bytes = 0;

  void add(const InspectedTensor& tensor) {
    ++tensors;
    parameters += tensor.parameters;
    bytes += tensor.bytes;
  }
  double bytes_per_parameter() const {
    return parameters == 0 ? 0.0 : static_cast<double>(bytes) / static_cast<double>(parameters);
  }
};

/// 1234567 -> "1,234,567".
std::string grouped(std::int64_t number) {
  std::string digits = std::to_string(number);
  for (std::size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

std::string decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", value);
  return text;
}

Row totals_row(const std::string& name, const Totals& totals) {
  return {name, grouped(totals.tensors), grouped(totals.parameters), grouped(totals.bytes),
          decimal(totals.bytes_per_parameter())};
}

std::map<std::string, Totals> by_type(const Inspection& found) {
  std::map<std::string, Totals> types;
  for (const InspectedTensor& tensor : found.tensors) types[tensor.type].add(tensor);
  return types;
}

std::string summary_table(const Inspection& found) {
  std::vector<Row> rows = {{"type", "tensors", "parameters", "bytes", "bytes/param"}};
  Totals all;
  for (const InspectedTensor& tensor : found.tensors) all.add(tensor);
  for (const auto& [type, totals] : by_type(found)) rows.push_back(totals_row(type, totals));
  rows.push_back(totals_row("total", all));
  return table(rows, {false, true, true, true, true});
}

std::string tensor_table(const Inspection& found, bool all) {
  constexpr std::size_t kShown = 12;
  std::vector<Row> rows = {{"name", "shape", "type", "bytes"}};
  const std::size_t count = all ? found.tensors.size() : std::min(kShown, found.tensors.size());
  for (std::size_t i = 0; i < count; ++i) {
    const InspectedTensor& tensor = found.tensors[i];
    rows.push_back({printable(tensor.name, 120), shape_string(tensor.shape), tensor.type,
                    grouped(tensor.bytes)});
  }
  std::string out = table(rows, {false, false, false, true});
  if (count < found.tensors.size()) {
    out +=
        "  ... " + std::to_string(found.tensors.size() - count) + " more (--tensors lists all)\n";
  }
  return out;
}

Json tensor_json(const InspectedTensor& tensor) {
  return {{"name", tensor.name},   {"shape", tensor.shape},
          {"type", tensor.type},   {"parameters", tensor.parameters},
          {"bytes", tensor.bytes}, {"quantized_layer", tensor.quantized_layer}};
}

Json totals_json(const Totals& totals) {
  return {{"tensors", totals.tensors},
          {"parameters", totals.parameters},
          {"bytes", totals.bytes},
          {"bytes_per_parameter", totals.bytes_per_parameter()}};
}

}  // namespace

std::string inspect_text(const std::string& path, bool all_tensors) {
  const Inspection found = checkpoint::inspect(path);
  std::string out = printable(found.path, 400) + "\n  " + found.container + "\n";
  if (!found.layout.empty()) out += "  layout " + printable(found.layout, 400) + "\n";
  if (!found.quantization.empty()) {
    out += "  quantized with " + printable(found.quantization, 400) + "\n";
  }
  for (const std::string& note : found.notes) out += "  note: " + printable(note, 400) + "\n";
  if (!found.unread.empty()) {
    out += "  layers are shown as raw tensors: " + printable(found.unread, 400) + "\n";
  }
  if (!found.metadata.empty()) {
    std::vector<Row> rows;
    for (const auto& [key, value] : found.metadata) {
      rows.push_back({printable(key, 60), printable(value, 76)});
    }
    out += "\nmetadata\n" + table(rows, {false, false});
  }
  out += "\ntensors\n" + tensor_table(found, all_tensors);
  return out + "\nsize\n" + summary_table(found);
}

std::string inspect_json(const std::string& path) {
  const Inspection found = checkpoint::inspect(path);
  Json out;
  out["path"] = found.path;
  out["container"] = found.container;
  out["layout"] = found.layout;
  out["quantization"] = found.quantization;
  out["unread"] = found.unread;
  out["notes"] = found.notes;
  out["metadata"] = Json::object();
  for (const auto& [key, value] : found.metadata) out["metadata"][key] = value;
  out["types"] = Json::object();
  for (const auto& [type, totals] : by_type(found)) out["types"][type] = totals_json(totals);
  Totals all;
  out["tensors"] = Json::array();
  for (const InspectedTensor& tensor : found.tensors) {
    all.add(tensor);
    out["tensors"].push_back(tensor_json(tensor));
  }
  out["totals"] = totals_json(all);
  return checkpoint::dump_json(out);
}

}  // namespace quantal

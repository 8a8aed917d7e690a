#include "policy/coverage.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace quantal::policy {
namespace {

using Json = nlohmann::ordered_json;

struct SplitName {
  std::string shape;                  ///< numeric components replaced by '\n'
  std::vector<std::int64_t> numbers;  ///< in order
};

SplitName split_numbers(const std::string& name) {
  SplitName out;
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    const bool numeric = !part.empty() && part.size() <= 9 &&
                         part.find_first_not_of("0123456789") == std::string::npos;
    if (begin != 0) out.shape += '.';
    out.shape += numeric ? "\n" : part;
    if (numeric) out.numbers.push_back(std::stoll(part));
    begin = end + 1;
  }
  return out;
}

/// "7", "{0..29}", "{0,2,5}" or, when long, "{0..29 (12 of 30)}".
std::string number_set(const std::set<std::int64_t>& numbers) {
  const std::int64_t first = *numbers.begin(), last = *numbers.rbegin();
  const auto count = static_cast<std::int64_t>(numbers.size());
  if (count == 1) return std::to_string(first);
  const std::string range = std::to_string(first) + ".." + std::to_string(last);
  if (count == last - first + 1) return "{" + range + "}";
  if (count > 4) {
    return "{" + range + " (" + std::to_string(count) + " of " + std::to_string(last - first + 1) +
           ")}";
  }
  std::string list;
  for (const std::int64_t n : numbers) list += (list.empty() ? "" : ",") + std::to_string(n);
  return "{" + list + "}";
}

struct Collecting {
  CoverageGroup group;
  std::string shape;
  std::vector<std::set<std::int64_t>> numbers;
  double squared = 0;
};

std::string full_name(const Collecting& c) {
  std::string name;
  std::size_t next = 0;
  for (const char ch : c.shape) {
    if (ch == '\n') {
      name += number_set(c.numbers[next++]);
    } else {
      name += ch;
    }
  }
  return name;
}

Json totals_json(const CoverageTotals& totals) {
  return {{"layers", totals.layers},
          {"parameters", totals.parameters},
          {"bytes_before", totals.bytes_before},
          {"bytes_after", totals.bytes_after},
          {"bytes_per_parameter", totals.bytes_per_parameter()}};
}

}  // namespace

void CoverageTotals::add(const CoverageEntry& entry) {
  ++layers;
  parameters += entry.parameters;
  bytes_before += entry.bytes_before;
  bytes_after += entry.bytes_after;
}

double CoverageTotals::bytes_per_parameter() const {
  if (parameters == 0) return 0;
  return static_cast<double>(bytes_after) / static_cast<double>(parameters);
}

bool is_dense(const CoverageEntry& entry) { return entry.method == "dense"; }

CoverageSummary summarize(const std::vector<CoverageEntry>& entries) {
  CoverageSummary summary;
  for (const CoverageEntry& entry : entries) {
    summary.all.add(entry);
    (is_dense(entry) ? summary.dense : summary.quantized).add(entry);
    summary.by_method[entry.method].add(entry);
  }
  return summary;
}

std::vector<CoverageGroup> group_entries(const std::vector<CoverageEntry>& entries) {
  std::vector<Collecting> collected;
  std::map<std::string, std::size_t> index;
  for (const CoverageEntry& entry : entries) {
    const SplitName split = split_numbers(entry.name);
    const std::string key = split.shape + '\r' + entry.method + '\r' + entry.reason + '\r' +
                            std::to_string(entry.parameters);
    const auto [found, fresh] = index.try_emplace(key, collected.size());
    if (fresh) {
      collected.push_back({{"", entry.method, entry.reason, {}, 0}, split.shape, {}, 0});
      collected.back().numbers.resize(split.numbers.size());
    }
    Collecting& group = collected[found->second];
    for (std::size_t i = 0; i < split.numbers.size(); ++i) {
      group.numbers[i].insert(split.numbers[i]);
    }
    group.group.totals.add(entry);
    group.squared +=
        entry.relative_error * entry.relative_error * static_cast<double>(entry.parameters);
  }
  std::vector<CoverageGroup> groups;
  for (Collecting& c : collected) {
    c.group.name = full_name(c);
    const auto parameters = static_cast<double>(c.group.totals.parameters);
    c.group.relative_error = parameters > 0 ? std::sqrt(c.squared / parameters) : 0;
    groups.push_back(std::move(c.group));
  }
  return groups;
}

}  // namespace quantal::policy

namespace quantal {

std::string CoverageReport::to_json() const {
  using policy::totals_json;
  using Json = nlohmann::ordered_json;
  Json root = {{"entries", Json::array()}, {"substitutions", Json::array()}};
  for (const CoverageEntry& e : entries) {
    root["entries"].push_back({{"name", e.name},
                               {"method", e.method},
                               {"reason", e.reason},
                               {"parameters", e.parameters},
                               {"bytes_before", e.bytes_before},
                               {"bytes_after", e.bytes_after},
                               {"relative_error", e.relative_error}});
  }
  for (const Substitution& s : substitutions) {
    root["substitutions"].push_back(
        {{"what", s.what}, {"asked", s.asked}, {"used", s.used}, {"reason", s.reason}});
  }
  root["unmatched_patterns"] = unmatched_patterns;
  root["notes"] = notes;
  const policy::CoverageSummary summary = policy::summarize(entries);
  root["totals"] = {{"all", totals_json(summary.all)},
                    {"quantized", totals_json(summary.quantized)},
                    {"dense", totals_json(summary.dense)}};
  root["by_method"] = Json::object();
  for (const auto& [method, totals] : summary.by_method) {
    root["by_method"][method] = totals_json(totals);
  }
  return root.dump(1, ' ', false, Json::error_handler_t::replace);
}

CoverageReport CoverageReport::from_json(const std::string& json) {
  CoverageReport report;
  try {
    const auto root = nlohmann::ordered_json::parse(json);
    for (const auto& e : root.at("entries")) {
      const auto& error = e.at("relative_error");  // NaN is written as null
      report.entries.push_back({e.at("name"), e.at("method"), e.at("reason"), e.at("parameters"),
                                e.at("bytes_before"), e.at("bytes_after"),
                                error.is_null() ? std::nan("") : error.get<double>()});
    }
    for (const auto& s : root.at("substitutions")) {
      report.substitutions.push_back({s.at("what"), s.at("asked"), s.at("used"), s.at("reason")});
    }
    report.unmatched_patterns = root.at("unmatched_patterns").get<std::vector<std::string>>();
    report.notes = root.value("notes", std::vector<std::string>{});
  } catch (const nlohmann::json::exception& error) {
    fail(Errc::kConfig, std::string("coverage report: text is not one (") + error.what() + ")");
  }
  return report;
}

}  // namespace quantal

// A plan for people.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "checkpoint/plan_parts.h"
#include "checkpoint/table.h"
#include "policy/coverage.h"

namespace quantal {
namespace checkpoint {
namespace {

constexpr std::size_t kWidth = 100;
constexpr std::size_t kNameWidth = 33, kFormWidth = 24;

std::string decimals(double value, int digits) {
  char text[48];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

/// Three digits and the largest unit below the value.
std::string scaled(double value, const char* const* units, std::size_t count) {
  std::size_t unit = 0;
  while (value >= 999.5 && unit + 1 < count) {
    value /= 1000;
    ++unit;
  }
  const int digits = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  std::string text = decimals(value, digits) + " " + units[unit];
  if (text.back() == ' ') text.pop_back();
  return text;
}

/// The end of a long name tells more than its beginning.
std::string shortened(const std::string& text, std::size_t width) {
  return text.size() <= width ? text : ".." + text.substr(text.size() - (width - 2));
}

/// Of a form the beginning tells more; that it is as stored stands in the head.
std::string short_form(std::string form) {
  const std::size_t end = form.rfind(" (as stored)");
  if (end != std::string::npos) form.resize(end);
  return form.size() <= kFormWidth ? form : form.substr(0, kFormWidth - 2) + "..";
}

/// "~14 GB", "~3.5 GB"
std::string about(double bytes) {
  static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < std::size(kUnits)) {
    bytes /= 1000;
    ++unit;
  }
  char text[48];
  std::snprintf(text, sizeof text, "~%.3g %s", bytes, kUnits[unit]);
  return text;
}

/// Folded at spaces to kWidth; later lines are indented.
std::string folded(const std::string& text, std::size_t indent) {
  std::string out, rest = text;
  while (rest.size() > kWidth) {
    std::size_t cut = rest.rfind(' ', kWidth);
    if (cut == std::string::npos || cut <= indent + 8) cut = kWidth;
    out += rest.substr(0, cut) + "\n";
    rest = std::string(indent, ' ') + rest.substr(rest[cut] == ' ' ? cut + 1 : cut);
  }
  return out + rest + "\n";
}

std::string ranks_text(std::int64_t ranks) {
  return std::to_string(ranks) + (ranks == 1 ? " rank" : " ranks");
}

std::string head(const Plan& plan) {
  const PlanOptions& o = plan.options;
  std::string out = folded(printable(plan.source, 200) + ": " + count_text(plan.parameters) +
                               " parameters, " + gigabytes(plan.stored_bytes) + " stored",
                           2);
  out += plan.label() + (plan.recommended ? " (recommended)" : "") + " on " +
         std::string(backend_name(o.backend)) + ", " + std::string(plan_mode_name(o.mode)) + ", " +
         ranks_text(o.world_size) + ", " + std::to_string(o.batch_size) + " x " +
         std::to_string(o.sequence_length) + " tokens\n";
  out += "weights " + gigabytes(plan.resident_bytes) + " in memory, " + gigabytes(plan.file_bytes) +
         " in files";
  if (o.world_size > 1) out += ", " + gigabytes(plan.rank_bytes) + " on a rank";
  if (plan.adapter_parameters > 0) {
    out += ", " + count_text(plan.adapter_parameters) + " adapter parameters";
  }
  return out + "\n";
}

std::string layers_table(const Plan& plan) {
  std::vector<CoverageEntry> entries;
  for (const PlanLayer& row : plan.layers) {
    entries.push_back({row.name, row.method, row.quantized ? "" : row.reason, row.parameters,
                       row.stored_bytes, row.bytes, 0});
  }
  std::vector<Row> rows = {{"layers", "form", "parameters", "stored", "memory", "B/param"}};
  for (const policy::CoverageGroup& group : policy::group_entries(entries)) {
    const auto& totals = group.totals;
    rows.push_back({printable(shortened(group.name, kNameWidth), kNameWidth),
                    short_form(group.method), count_text(totals.parameters),
                    gigabytes(totals.bytes_before), gigabytes(totals.bytes_after),
                    decimals(totals.bytes_per_parameter(), 3)});
  }
  return table(rows, {false, false, true, true, true, true});
}

/// Only parts that exist, a column for each phase.
std::string phases_table(const Plan& plan) {
  std::vector<Row> rows = {{"memory of a rank"}};
  const PlanPhase& peak = plan.peak();
  for (const PlanPhase& phase : plan.phases) {
    rows[0].push_back(phase.name + (&phase == &peak ? " *" : ""));
  }
  const auto add = [&](const std::string& name, const auto& value, bool always) {
    Row row = {name};
    bool any = always;
    for (const PlanPhase& phase : plan.phases) {
      const std::int64_t bytes = value(phase);
      any = any || bytes != 0;
      row.push_back(bytes == 0 ? "-" : gigabytes(bytes));
    }
    if (any) rows.push_back(std::move(row));
  };
  for (std::size_t i = 0; i < kNumPlanParts; ++i) {
    add(
        std::string(plan_part_name(static_cast<PlanPart>(i))),
        [i](const PlanPhase& phase) { return phase.bytes[i]; }, false);
  }
  add(
      "total", [](const PlanPhase& phase) { return phase.total(); }, true);
  add(
      "host memory beside", [](const PlanPhase& phase) { return phase.host_bytes; }, false);
  return table(rows, {false, true, true, true, true, true});
}

/// Bytes per parameter; empty where there are none.
std::string per(std::int64_t bytes, std::int64_t parameters) {
  if (parameters == 0) return {};
  return decimals(static_cast<double>(bytes) / static_cast<double>(parameters), 3);
}

std::string rules_table(const Plan& plan) {
  constexpr double kGigabyte = 1e9;
  std::vector<Row> rows = {
      {"weights", "rule", "exact", "B/param", "quantized layers alone", "counted with"}};
  for (const PlanRule& rule : plan.rules) {
    rows.push_back({rule.width, about(rule.rule_gigabytes * kGigabyte), gigabytes(rule.exact_bytes),
                    per(rule.exact_bytes, plan.parameters),
                    per(rule.quantized_bytes, rule.quantized_parameters), rule.method});
  }
  return table(rows, {false, true, true, true, true, false});
}

std::string candidates_table(const Plan& plan) {
  std::vector<Row> rows = {{"weighed", "error", "resident", "peak", ""}};
  for (const PlanCandidate& c : plan.candidates) {
    std::string word = c.fits ? "fits" : "too large";
    if (plan.usable_bytes == 0) word.clear();
    rows.push_back({c.label, decimals(c.relative_error, 4), gigabytes(c.resident_bytes),
                    gigabytes(c.peak_bytes), word});
  }
  return table(rows, {false, true, true, true, false});
}

}  // namespace

std::string gigabytes(std::int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  return scaled(static_cast<double>(bytes), kUnits, std::size(kUnits));
}

std::string count_text(std::int64_t count) {
  static constexpr const char* kUnits[] = {"", "k", "M", "B", "T"};
  return scaled(static_cast<double>(count), kUnits, std::size(kUnits));
}

std::string verdict(const Plan& plan) {
  const PlanPhase& peak = plan.peak();
  std::string need = "peak " + gigabytes(peak.total()) + " (" + peak.name + ")";
  if (plan.usable_bytes == 0) return need;
  const std::string have =
      gigabytes(plan.usable_bytes) + " usable of " + gigabytes(plan.options.memory_bytes);
  if (plan.fits) {
    std::string text = "fits: " + need + ", " + have;
    if (plan.largest_batch > 0) text += "; batch size up to " + std::to_string(plan.largest_batch);
    return text;
  }
  std::string text = "does not fit: " + need + ", " + have + ", " +
                     gigabytes(peak.total() - plan.usable_bytes) + " are missing";
  if (plan.recommended) text += "; no config of this backend fits, this is the smallest";
  return text;
}

}  // namespace checkpoint

std::string Plan::to_text() const {
  using namespace checkpoint;
  std::string out = head(*this) + "\n" + layers_table(*this) + "\n" + phases_table(*this) + "\n" +
                    rules_table(*this);
  if (!candidates.empty()) out += "\n" + candidates_table(*this);
  if (!unmatched_patterns.empty()) out += "\nPatterns that matched no layer\n";
  for (const std::string& pattern : unmatched_patterns) {
    out += folded("  " + printable(pattern, 200), 4);
  }
  if (!notes.empty()) out += "\n";
  for (const std::string& note : notes) out += folded("note: " + printable(note, 400), 6);
  return out + "\n" + folded(verdict(*this), 2);
}

}  // namespace quantal

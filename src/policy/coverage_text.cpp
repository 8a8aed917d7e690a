#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "policy/coverage.h"

namespace quantal {
namespace {

using policy::CoverageGroup;
using policy::CoverageTotals;

constexpr std::size_t kWidth = 100;
constexpr std::size_t kMinNameWidth = 24;
constexpr std::size_t kMaxMethodWidth = 24;
constexpr std::size_t kLeftOvers = 5;

/// 1234567 -> "1.23 M"; `unit` is appended to the scale letter.
std::string short_number(double value, const char* unit) {
  static constexpr const char* kScales[] = {"", "k", "M", "G", "T", "P"};
  std::size_t scale = 0;
  while (value >= 999.5 && scale + 1 < std::size(kScales)) {
    value /= 1000;
    ++scale;
  }
  char text[48];
  const int digits = scale == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  std::snprintf(text, sizeof(text), "%.*f %s%s", digits, value, kScales[scale], unit);
  std::string out(text);
  while (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

std::string bytes_text(std::int64_t bytes) { return short_number(static_cast<double>(bytes), "B"); }
std::string count_text(std::int64_t count) { return short_number(static_cast<double>(count), ""); }

std::string error_text(const CoverageGroup& group) {
  if (group.method == "dense") return "";
  if (!std::isfinite(group.relative_error)) return "n/a";
  char text[32];
  std::snprintf(text, sizeof(text), "%.4f", group.relative_error);
  return text;
}

std::string ratio_text(const CoverageTotals& totals) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f", totals.bytes_per_parameter());
  return text;
}

/// Keeps both ends of a long name.
std::string shorten(const std::string& text, std::size_t width) {
  if (text.size() <= width) return text;
  const std::size_t tail = (width - 2) * 2 / 3;
  return text.substr(0, width - 2 - tail) + ".." + text.substr(text.size() - tail);
}

std::string pad(const std::string& text, std::size_t width, bool right) {
  if (text.size() >= width) return text;
  const std::string space(width - text.size(), ' ');
  return right ? space + text : text + space;
}

/// Text folded at spaces to kWidth; later lines are indented.
std::string folded(const std::string& text) {
  static constexpr std::size_t kIndent = 6;
  std::string out, rest = text;
  std::size_t limit = kWidth;
  while (rest.size() > limit) {
    std::size_t cut = rest.rfind(' ', limit);
    if (cut == std::string::npos || cut < limit / 2) cut = limit;
    out += rest.substr(0, cut) + "\n" + std::string(kIndent, ' ');
    rest = rest.substr(std::min(rest.size(), rest[cut] == ' ' ? cut + 1 : cut));
    limit = kWidth - kIndent;
  }
  return out + rest + "\n";
}

using Row = std::vector<std::string>;

Row totals_row(const std::string& name, const CoverageTotals& totals) {
  return {name,
          std::to_string(totals.layers),
          "",
          count_text(totals.parameters),
          bytes_text(totals.bytes_before),
          bytes_text(totals.bytes_after),
          ratio_text(totals),
          ""};
}

/// Columns separated by one blank; the first (names) gets what the others leave of kWidth.
std::string table(std::vector<Row> rows, std::size_t body_rows) {
  std::vector<std::size_t> widths(rows[0].size(), 0);
  for (const Row& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::size_t others = 0;
  for (std::size_t c = 1; c < widths.size(); ++c) others += widths[c] + 1;
  widths[0] = std::min(widths[0], std::max(kMinNameWidth, kWidth - std::min(kWidth, others)));
  const std::string rule(widths[0] + others, '-');
  std::string out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (r == 1 || r == 1 + body_rows) out += rule + "\n";
    rows[r][0] = shorten(rows[r][0], widths[0]);
    std::string line;
    for (std::size_t c = 0; c < rows[r].size(); ++c) {
      line += (c == 0 ? "" : " ") + pad(rows[r][c], widths[c], c != 0 && c != 2);
    }
    line.resize(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string left_overs(std::vector<CoverageGroup> groups, std::int64_t total_bytes) {
  std::erase_if(groups, [](const CoverageGroup& g) { return g.method != "dense"; });
  std::stable_sort(groups.begin(), groups.end(), [](const auto& a, const auto& b) {
    return a.totals.bytes_after > b.totals.bytes_after;
  });
  if (groups.empty()) return "";
  std::string out = "\nLargest left-overs (dense)\n";
  for (std::size_t i = 0; i < std::min(groups.size(), kLeftOvers); ++i) {
    const CoverageGroup& group = groups[i];
    const double share = total_bytes > 0 ? 100.0 * static_cast<double>(group.totals.bytes_after) /
                                               static_cast<double>(total_bytes)
                                         : 0.0;
    char head[64];
    std::snprintf(head, sizeof(head), " (%.1f %% of all bytes)", share);
    out += folded("  " + shorten(group.name, 60) + "  " + bytes_text(group.totals.bytes_after) +
                  head + (group.reason.empty() ? "" : ": " + group.reason));
  }
  if (groups.size() > kLeftOvers) {
    out += "  and " + std::to_string(groups.size() - kLeftOvers) + " more\n";
  }
  return out;
}

}  // namespace

std::string CoverageReport::to_text() const {
  const std::vector<CoverageGroup> groups = policy::group_entries(entries);
  const policy::CoverageSummary summary = policy::summarize(entries);
  std::vector<Row> rows = {
      {"layer", "count", "method", "params", "before", "after", "B/param", "error"}};
  for (const CoverageGroup& group : groups) {
    Row row = totals_row(group.name, group.totals);
    row[2] = shorten(group.method, kMaxMethodWidth);
    row[7] = error_text(group);
    rows.push_back(std::move(row));
  }
  rows.push_back(totals_row("quantized", summary.quantized));
  rows.push_back(totals_row("dense", summary.dense));
  rows.push_back(totals_row("all", summary.all));
  std::string out = table(std::move(rows), groups.size());
  out += "error = ||W - dequantized||_F / ||W||_F, root mean square over the layers of a row\n";
  out += left_overs(groups, summary.all.bytes_after);
  if (!substitutions.empty()) out += "\nSubstitutions\n";
  for (const Substitution& s : substitutions) {
    out +=
        folded("  " + s.what + ": asked " + s.asked + ", used " + s.used + " (" + s.reason + ")");
  }
  if (!unmatched_patterns.empty()) out += "\nPatterns that matched no layer\n";
  for (const std::string& pattern : unmatched_patterns) out += folded("  " + pattern);
  if (!notes.empty()) out += "\nNotes\n";
  for (const std::string& note : notes) out += folded("  " + note);
  return out;
}

}  // namespace quantal

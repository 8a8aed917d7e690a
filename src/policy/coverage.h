// Sums over a coverage report, shared by its text and its JSON form.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "quantal/policy.h"

namespace quantal::policy {

/// Sums over some entries.
struct CoverageTotals {
  std::int64_t layers = 0, parameters = 0, bytes_before = 0, bytes_after = 0;
  void add(const CoverageEntry& entry);
  double bytes_per_parameter() const;  ///< after; 0 if there are no parameters
};
struct CoverageSummary {
  CoverageTotals all, quantized, dense;
  std::map<std::string, CoverageTotals> by_method;
};
CoverageSummary summarize(const std::vector<CoverageEntry>& entries);
bool is_dense(const CoverageEntry& entry);

/// Entries whose names differ only in numbers and that were treated alike.
struct CoverageGroup {
  std::string name;  ///< "model.layers.{0..29}.self_attn.q_proj"
  std::string method, reason;
  CoverageTotals totals;
  double relative_error = 0;  ///< root mean square, weighted by parameters
};
/// In order of first appearance.
std::vector<CoverageGroup> group_entries(const std::vector<CoverageEntry>& entries);

}  // namespace quantal::policy

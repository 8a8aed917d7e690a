// quantal coverage: what became of the layers of a model, and what policy changed. Part of the room
// policy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quantal/formats.h"

namespace quantal {

/// A change that policy made to what was asked, e.g. {"bits", "4", "8", "method bnb_int8 has 8
/// bits"}.
struct Substitution {
  std::string what;    ///< setting: "method", "bits", "layer_configs['...']"
  std::string asked;   ///< its value
  std::string used;    ///< instead
  std::string reason;  ///< one sentence
};

/// One row of a coverage report.
struct CoverageEntry {
  std::string name;               ///< dotted
  std::string method;             ///< "hqq 4-bit g64", or "dense"
  std::string reason;             ///< why dense
  std::int64_t parameters = 0;    ///< weights and biases
  std::int64_t bytes_before = 0;  ///< as it was
  std::int64_t bytes_after = 0;   ///< as it is
  double relative_error = 0;      ///< ||W - deq(W)||_F / ||W||_F
};
/// What happened to a model; same text in C++ and Python.
struct CoverageReport {
  std::vector<CoverageEntry> entries;           ///< layers, then everything else
  std::vector<Substitution> substitutions;      ///< what policy and files changed
  std::vector<std::string> unmatched_patterns;  ///< LayerRules::unmatched
  std::vector<std::string> notes;  ///< about the whole: the note of the adapter's config
  /// Table for a terminal, at most 100 columns wide: layers that differ only in their numbers share
  /// a row; then totals, largest left-overs, substitutions and unmatched patterns.
  std::string to_text() const;
  /// Object with every entry, totals, totals by method, substitutions, unmatched_patterns, notes.
  std::string to_json() const;
  /// Inverse of to_json on the four members; notes may be absent. Throws Error{kConfig}.
  static CoverageReport from_json(const std::string& json);
};
/// "hqq 4-bit g64", "bnb_nf4 4-bit g64 double": the method column of a report.
std::string describe_options(const QuantizeOptions& options);

}  // namespace quantal

// Every statement of every edge between dialects, checked on random matrices.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "formats/transcode_support.h"
#include "quantal/transcode.h"

namespace quantal::testing {
namespace {

using transcoding::EdgeForms;

bool waits(const Preservation& p) {
  return p.note.find("depends on the values") != std::string::npos;
}

/// Codes are renamed one to one.
void expect_renamed(const PackedMatrix& from, const PackedMatrix& to) {
  const std::vector<std::uint8_t> a = all_codes(from), b = all_codes(to);
  std::map<std::uint8_t, std::uint8_t> forward;
  std::set<std::uint8_t> images;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto [it, fresh] = forward.emplace(a[i], b[i]);
    ASSERT_EQ(it->second, b[i]) << "code " << int{a[i]} << " became two codes, element " << i;
    if (fresh) images.insert(b[i]);
  }
  // -0 and 0 of a 4-bit float are the same integer.
  const std::size_t twins =
      from.spec.code_map == CodeMap::kE2M1 && to.spec.code_map != CodeMap::kE2M1;
  EXPECT_GE(images.size() + twins, forward.size());
}

/// What one matrix shows about the statement.
struct Seen {
  bool differs = false;  ///< a value differs in the stated type
  double ulp = 0;
};

Seen check_matrix(const EdgeForms& edge, const Preservation& plan, const PackedMatrix& w) {
  Seen seen;
  const Transcoded t = transcode(w.view(), edge.to, OddExecutor());
  EXPECT_TRUE(t.kept.codes) << t.kept.note;
  if (!t.kept.codes) return seen;
  expect_renamed(w, t.matrix);
  seen.ulp = t.kept.statistics_ulp;
  EXPECT_EQ(t.kept.statistics, t.kept.statistics_ulp == 0);
  EXPECT_LE(t.kept.statistics_ulp, plan.statistics_ulp);
  const std::vector<float> a = all_values(w), b = all_values(t.matrix);
  const std::vector<double> size_a = magnitudes(w), size_b = magnitudes(t.matrix);
  const PackedSpec& from = w.spec;
  const PackedSpec& to = t.matrix.spec;
  const DType storage = to.scale == ScaleSource::kF16    ? DType::kF16
                        : to.scale == ScaleSource::kBF16 ? DType::kBF16
                                                         : DType::kF32;
  const int p = std::min({transcoding::float_precision(from.value_dtype),
                          transcoding::float_precision(to.value_dtype),
                          transcoding::float_precision(storage)});
  const DType stated = plan.values ? plan.values_dtype : DType::kF32;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool equal = rounded(stated, a[i]) == rounded(stated, b[i]);
    if (plan.values && !equal) {
      ADD_FAILURE() << "element " << i << ": " << a[i] << " became " << b[i];
      return seen;
    }
    seen.differs = seen.differs || !equal;
    const double bound = 6 * std::ldexp(1.0, -p) * std::max(size_a[i], size_b[i]) + 1e-30;
    const double error = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!plan.values && error > bound) {
      ADD_FAILURE() << "element " << i << ": " << a[i] << " became " << b[i] << ", bound " << bound;
      return seen;
    }
  }
  if (plan.values) {
    EXPECT_TRUE(t.kept.values);
    EXPECT_EQ(t.relative_error, 0);
  }
  return seen;
}

TEST(TranscodeEdges, EveryStatementHoldsAndNoneIsPessimistic) {
  int copied = 0, exact = 0, conditional = 0;
  for (const EdgeForms& edge : transcoding::edge_forms()) {
    const PackedSpec target = transcoding::target_spec(edge.from, edge.to);
    SCOPED_TRACE(transcoding::form_name(edge.from) + " -> " + transcoding::form_name(target));
    const Preservation plan = plan_transcode(edge.from, edge.to);
    if (!plan.codes) continue;
    ++copied;
    bool differs = false;
    double ulp = 0;
    const Kind kind = waits(plan) ? Kind::kUniform : Kind::kMixed;
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      const Seen seen = check_matrix(edge, plan, random_form(edge.from, kind, seed));
      differs = differs || seen.differs;
      ulp = std::max(ulp, seen.ulp);
      if (HasFailure()) return;
    }
    exact += plan.lossless();
    conditional += waits(plan);
    if (kind == Kind::kUniform) continue;  // few numbers: too tame to find a counterexample
    EXPECT_EQ(plan.values, !differs) << "stated " << plan.values << ": " << plan.note;
    EXPECT_EQ(plan.statistics, ulp == 0) << "largest rounding " << ulp << ": " << plan.note;
  }
  EXPECT_GT(copied, 100);
  EXPECT_GT(exact, 60);
  EXPECT_GT(conditional, 10);
}

TEST(TranscodeEdges, WhatDependsOnTheValuesIsQuantizedAgainWhereItDoesNotHold) {
  int checked = 0;
  for (const EdgeForms& edge : transcoding::edge_forms()) {
    const Preservation plan = plan_transcode(edge.from, edge.to);
    if (!waits(plan) || plan.note.find("range") != std::string::npos) continue;
    const PackedSpec target = transcoding::target_spec(edge.from, edge.to);
    SCOPED_TRACE(transcoding::form_name(edge.from) + " -> " + transcoding::form_name(target));
    const PackedMatrix w = random_form(edge.from, Kind::kMixed, 3);
    const Transcoded t = transcode(w.view(), edge.to, serial_executor());
    EXPECT_FALSE(t.kept.codes);
    EXPECT_GT(t.relative_error, 0);
    TranscodeTarget strict = edge.to;
    strict.lossless_only = true;
    expect_error(Errc::kUnsupported, {"is not lossless"},
                 [&] { transcode(w.view(), strict, serial_executor()); });
    ++checked;
  }
  EXPECT_GT(checked, 10);
}

TEST(TranscodeEdges, LossyOnesAreQuantizedAgainAndMeasured) {
  int checked = 0;
  for (const EdgeForms& edge : transcoding::edge_forms()) {
    if (plan_transcode(edge.from, edge.to).codes) continue;
    const PackedSpec target = transcoding::target_spec(edge.from, edge.to);
    SCOPED_TRACE(transcoding::form_name(edge.from) + " -> " + transcoding::form_name(target));
    const PackedMatrix w = random_form(edge.from, Kind::kMixed, 5);
    const Transcoded t = transcode(w.view(), edge.to, serial_executor());
    EXPECT_FALSE(t.kept.codes);
    EXPECT_FALSE(t.kept.lossless());
    const std::vector<float> a = all_values(w), b = all_values(t.matrix);
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
      error += d * d;
      norm += static_cast<double>(a[i]) * static_cast<double>(a[i]);
    }
    EXPECT_NEAR(t.relative_error, std::sqrt(error / norm), 1e-9);
    EXPECT_LT(t.relative_error, 0.8);
    TranscodeTarget strict = edge.to;
    strict.lossless_only = true;
    expect_error(Errc::kUnsupported, {"is not lossless", "quantized again"},
                 [&] { transcode(w.view(), strict, serial_executor()); });
    ++checked;
  }
  EXPECT_GT(checked, 40);
}

TEST(TranscodeEdges, DocumentationHoldsTheGeneratedTable) {
  std::ifstream in(std::string(QUANTAL_SOURCE_DIR) + "/docs/convert.md");
  std::stringstream text;
  text << in.rdbuf();
  const std::string table = transcode_edges_markdown();
  if (std::getenv("QUANTAL_WRITE_DOCS") != nullptr) {
    const std::string begin = "<!-- edges -->\n", end = "<!-- end of edges -->";
    std::string doc = text.str();
    const std::size_t a = doc.find(begin) + begin.size();
    doc.replace(a, doc.find(end) - a, table);
    std::ofstream(std::string(QUANTAL_SOURCE_DIR) + "/docs/convert.md") << doc;
    return;
  }
  EXPECT_NE(text.str().find(table), std::string::npos)
      << "docs/convert.md is not what transcode_edges_markdown() says; run this test with "
         "QUANTAL_WRITE_DOCS=1";
}

}  // namespace
}  // namespace quantal::testing

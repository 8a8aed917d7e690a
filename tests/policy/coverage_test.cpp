#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "quantal/policy.h"

namespace quantal {
namespace {

CoverageReport sample_report() {
  CoverageReport report;
  for (int i = 0; i < 30; ++i) {
    const std::string block = "model.layers." + std::to_string(i);
    report.entries.push_back(
        {block + ".self_attn.q_proj", "hqq 4-bit g64", "", 576 * 576, 576 * 576 * 2, 186624, 0.08});
    report.entries.push_back(
        {block + ".self_attn.k_proj", "hqq 4-bit g64", "", 192 * 576, 192 * 576 * 2, 62208, 0.06});
  }
  report.entries.push_back({"model.embed_tokens", "dense", "not a linear layer", 49152 * 576,
                            49152 * 576 * 2, 49152 * 576 * 2, 0});
  report.entries.push_back({"lm_head", "dense", "skip_modules pattern 'lm_head'", 10, 20, 20, 0});
  report.substitutions.push_back({"method", "bnb_nf4", "hqq 4-bit", "only supported on CUDA"});
  report.unmatched_patterns.push_back("skip_modules: lm_hed");
  return report;
}

std::size_t widest_line(const std::string& text) {
  std::istringstream lines(text);
  std::size_t widest = 0;
  for (std::string line; std::getline(lines, line);) widest = std::max(widest, line.size());
  return widest;
}

TEST(CoverageText, CollapsesLayersAndStaysNarrow) {
  const std::string text = sample_report().to_text();
  EXPECT_NE(text.find("model.layers.{0..29}.self_attn.q_proj    30 hqq"), std::string::npos)
      << text;
  EXPECT_EQ(text.find("model.layers.0.self_attn"), std::string::npos) << text;
  EXPECT_LE(widest_line(text), 100u) << text;
}

TEST(CoverageText, NamesLeftOversSubstitutionsAndUnmatched) {
  const std::string text = sample_report().to_text();
  const std::size_t embedding = text.find("model.embed_tokens", text.find("Largest left-overs"));
  EXPECT_NE(embedding, std::string::npos) << text;
  EXPECT_LT(embedding, text.rfind("lm_head")) << "the larger one must come first\n" << text;
  EXPECT_NE(text.find("asked bnb_nf4, used hqq 4-bit (only supported on CUDA)"), std::string::npos);
  EXPECT_NE(text.find("skip_modules: lm_hed"), std::string::npos);
}

TEST(CoverageText, TotalsAddUp) {
  const std::string text = sample_report().to_text();
  // 30 * (331776 + 110592) = 13,271,040 parameters in 30 * 248,832 = 7,464,960 bytes.
  const std::size_t row = text.find("\nquantized");
  ASSERT_NE(row, std::string::npos);
  const std::string line = text.substr(row + 1, text.find('\n', row + 1) - row - 1);
  EXPECT_NE(line.find(" 60 "), std::string::npos) << line;
  EXPECT_NE(line.find("13.3 M"), std::string::npos) << line;
  EXPECT_NE(line.find("26.5 MB"), std::string::npos) << line;
  EXPECT_NE(line.find("7.46 MB"), std::string::npos) << line;
  EXPECT_NE(line.find("0.562"), std::string::npos) << line;
}

TEST(CoverageText, LongNamesAndReasonsAreFolded) {
  CoverageReport report = sample_report();
  report.entries.push_back({std::string(300, 'x') + ".proj", "bnb_nf4 4-bit g4096 fp4 double", "",
                            100, 200, 56, std::nan("")});
  report.entries.push_back(
      {"experts", "dense", std::string(400, 'r'), 1 << 30, 1 << 30, 1 << 30, 0});
  report.substitutions.push_back(
      {"layer_configs['" + std::string(200, 'p') + "']", "a", "b", "some words in a row"});
  const std::string text = report.to_text();
  EXPECT_LE(widest_line(text), 100u) << text;
  EXPECT_NE(text.find("n/a"), std::string::npos) << text;
}

TEST(CoverageText, NumbersOfSeveralComponentsAndGaps) {
  CoverageReport report;
  for (const int layer : {0, 2, 5}) {
    for (int expert = 0; expert < 4; ++expert) {
      report.entries.push_back(
          {"m." + std::to_string(layer) + ".e." + std::to_string(expert) + ".w", "hqq 4-bit g64",
           "", 64, 128, 40, 0.1});
    }
  }
  EXPECT_NE(report.to_text().find("m.{0,2,5}.e.{0..3}.w"), std::string::npos) << report.to_text();
}

TEST(CoverageText, EmptyReport) {
  EXPECT_NE(CoverageReport{}.to_text().find("quantized"), std::string::npos);
}

TEST(CoverageJson, HoldsEveryEntryAndTotals) {
  const auto json = nlohmann::json::parse(sample_report().to_json());
  EXPECT_EQ(json.at("entries").size(), 62u);
  EXPECT_EQ(json.at("entries")[0].at("bytes_after"), 186624);
  EXPECT_EQ(json.at("totals").at("quantized").at("layers"), 60);
  EXPECT_EQ(json.at("totals").at("quantized").at("bytes_after"), 7464960);
  EXPECT_DOUBLE_EQ(json.at("by_method").at("hqq 4-bit g64").at("bytes_per_parameter"), 0.5625);
  EXPECT_EQ(json.at("unmatched_patterns")[0], "skip_modules: lm_hed");
}

TEST(CoverageJson, RoundTrips) {
  CoverageReport report = sample_report();
  report.entries[0].relative_error = std::nan("");
  report.notes = {"weights need more than there is"};
  const CoverageReport back = CoverageReport::from_json(report.to_json());
  EXPECT_TRUE(std::isnan(back.entries[0].relative_error));
  EXPECT_EQ(back.to_json(), report.to_json());
  EXPECT_NE(back.to_text().find("Notes\n  weights need more"), std::string::npos);
  EXPECT_THROW(CoverageReport::from_json("{}"), Error);
  EXPECT_THROW(CoverageReport::from_json("nonsense"), Error);
}

}  // namespace
}  // namespace quantal

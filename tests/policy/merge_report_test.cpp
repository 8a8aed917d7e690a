#include "quantal/merge_report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace quantal {
namespace {

TEST(MergeReport, OfNothingKeepsEverything) {
  const MergeReport report;
  EXPECT_EQ(report.codes(), 0);
  EXPECT_EQ(report.surviving(), 1);
  EXPECT_EQ(report.noise(), 0);
  EXPECT_EQ(nlohmann::json::parse(report.to_json())["layers"].size(), 0U);
}

TEST(MergeReport, WeighsLayersByTheSquareOfTheirChange) {
  const MergeReport report{
      {{"a", 100, 10, 2, 0.5, 0.3}, {"b", 300, 90, 1, 1, 0.1}, {"untouched", 50, 0, 0, 1, 7}}};
  EXPECT_EQ(report.codes(), 450);
  EXPECT_EQ(report.codes_changed(), 100);
  EXPECT_DOUBLE_EQ(report.surviving(), (4 * 0.5 + 1) / 5);
  EXPECT_DOUBLE_EQ(report.noise(), std::sqrt((4 * 0.09 + 0.01) / 5));
  const std::string text = report.to_text();
  EXPECT_LT(text.find("\na "), text.find("\nb "));  // what kept least comes first
  EXPECT_NE(text.find("\nall "), std::string::npos);
  EXPECT_EQ(nlohmann::json::parse(report.to_json())["layers"][0]["delta_norm"], 2);
}

}  // namespace
}  // namespace quantal

// docs/policy.md must say what the code does.
#include <gtest/gtest.h>

#include <fstream>
#include <regex>
#include <sstream>

#include "quantal/policy.h"

namespace quantal {
namespace {

std::string read_file(const std::string& relative) {
  std::ifstream in(std::string(QUANTAL_SOURCE_DIR) + "/" + relative);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

TEST(PolicyPage, HoldsTheGeneratedMatrix) {
  EXPECT_NE(read_file("docs/policy.md").find(compatibility_matrix_markdown()), std::string::npos);
}

TEST(PolicyPage, ListsEveryIssue) {
  const std::string page = read_file("docs/policy.md");
  const std::string code = read_file("src/policy/validate.cpp");
  const std::regex id(R"re((?:error|warning|no_effect)\("([a-z_]+\.[a-z_0-9]+)")re");
  int found = 0;
  for (auto it = std::sregex_iterator(code.begin(), code.end(), id); it != std::sregex_iterator();
       ++it, ++found) {
    EXPECT_NE(page.find("`" + (*it)[1].str() + "`"), std::string::npos) << (*it)[1];
  }
  EXPECT_GE(found, 23);
}

TEST(Methods, AreAllBuilt) {
  for (const MethodInfo& method : methods()) {
    EXPECT_TRUE(method_built(method.method)) << method.enum_name;
  }
}

}  // namespace
}  // namespace quantal

// The README must say what is read and written.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "quantal/checkpoint.h"

namespace quantal {
namespace {

TEST(Readme, HoldsTheGeneratedTableOfFormats) {
  const std::string path = std::string(QUANTAL_SOURCE_DIR) + "/README.md";
  std::string readme = read_text_file(path);
  const std::string table = formats_markdown();
  for (const Dialect* dialect : dialects()) {
    EXPECT_NE(table.find("(`" + std::string(dialect->name) + "`)"), std::string::npos);
    for (const FileLayout& layout : file_layouts(dialect)) {
      EXPECT_NE(table.find("`" + std::string(layout.name) + "`"), std::string::npos);
    }
  }
  const std::string begin = "<!-- formats -->\n", end = "<!-- end of formats -->";
  if (std::getenv("QUANTAL_WRITE_DOCS") != nullptr) {
    const std::size_t a = readme.find(begin) + begin.size();
    readme.replace(a, readme.find(end) - a, table);
    std::ofstream(path) << readme;
    return;
  }
  EXPECT_NE(readme.find(begin + table + end), std::string::npos)
      << "README.md is not what formats_markdown() says; run this test with QUANTAL_WRITE_DOCS=1";
}

}  // namespace
}  // namespace quantal

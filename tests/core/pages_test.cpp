#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quantal/core.h"

namespace quantal {
namespace {

TEST(LargePages, AreAHintThatChangesNoByte) {
  std::vector<std::uint8_t> memory(std::size_t{9} << 20, 7);
  for (const std::size_t offset : {0, 1, 4095, 4096}) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, (std::size_t{4} << 20) + 1}) {
      prefer_large_pages(memory.data() + offset, bytes);
    }
  }
  prefer_large_pages(nullptr, 0);
  EXPECT_TRUE(std::ranges::all_of(memory, [](std::uint8_t b) { return b == 7; }));
}

}  // namespace
}  // namespace quantal

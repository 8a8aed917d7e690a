#include "core/result_block.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace quantal {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

TEST(ResultBlock, NextResultOfTheSizeGetsTheReleasedBlock) {
  void* first = take_result_block(9 * kMiB);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % (2 * kMiB), 0U);
  void* second = take_result_block(9 * kMiB);
  EXPECT_NE(first, second);
  std::memset(first, 1, 9 * kMiB);
  std::memset(second, 2, 9 * kMiB);
  EXPECT_EQ(static_cast<const std::uint8_t*>(first)[9 * kMiB - 1], 1);
  const std::size_t before = kept_result_bytes();
  release_result_block(first, 9 * kMiB);
  EXPECT_EQ(kept_result_bytes(), before + 10 * kMiB);  // whole large pages
  void* other_size = take_result_block(13 * kMiB);
  EXPECT_NE(other_size, first);
  EXPECT_EQ(take_result_block(10 * kMiB), first);  // the same number of pages
  EXPECT_EQ(kept_result_bytes(), before);
  release_result_block(first, 10 * kMiB);
  release_result_block(second, 9 * kMiB);
  release_result_block(other_size, 13 * kMiB);
}

TEST(ResultBlock, KeptBytesAreBounded) {
  std::vector<void*> blocks;
  for (int i = 0; i < 20; ++i) blocks.push_back(take_result_block(5 * kMiB));
  for (void* block : blocks) {
    release_result_block(block, 5 * kMiB);
    EXPECT_LE(kept_result_bytes(), kKeptResultBytes);
  }
  void* whole = take_result_block(kKeptResultBytes);
  release_result_block(whole, kKeptResultBytes);  // older ones make room
  EXPECT_EQ(kept_result_bytes(), kKeptResultBytes);
  EXPECT_EQ(take_result_block(kKeptResultBytes), whole);
  release_result_block(whole, kKeptResultBytes);
  void* larger = take_result_block(kKeptResultBytes + 1);
  release_result_block(larger, kKeptResultBytes + 1);  // goes back to the system
  EXPECT_EQ(kept_result_bytes(), kKeptResultBytes);
}

TEST(ResultBlock, ThreadsNeverShareOne) {
  const auto work = [](std::uint8_t mark) {
    for (std::size_t i = 0; i < 50; ++i) {
      const std::size_t bytes = (4 + i % 3 * 2) * kMiB;
      auto* const block = static_cast<std::uint8_t*>(take_result_block(bytes));
      for (std::size_t at = 0; at < bytes; at += 4096) block[at] = mark;
      bool own = true;
      for (std::size_t at = 0; at < bytes; at += 4096) own &= block[at] == mark;
      EXPECT_TRUE(own);
      release_result_block(block, bytes);
    }
  };
  std::vector<std::thread> threads;
  for (std::uint8_t mark = 1; mark <= 4; ++mark) threads.emplace_back(work, mark);
  for (auto& thread : threads) thread.join();
  EXPECT_LE(kept_result_bytes(), kKeptResultBytes);
}

}  // namespace
}  // namespace quantal

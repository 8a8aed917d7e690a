#include "thread_executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace quantal::tools {
namespace {

TEST(ThreadExecutor, TakesEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    const ThreadExecutor executor(threads);
    EXPECT_EQ(executor.num_threads(), threads);
    for (const std::int64_t size : {0, 1, 2, 3, 1000}) {
      for (const std::int64_t grain : {-1, 0, 1, 7, 2000}) {
        std::vector<int> seen(static_cast<std::size_t>(size), 0);  // not atomic: one body each
        executor.parallel_for(10, 10 + size, grain, [&](std::int64_t begin, std::int64_t end) {
          EXPECT_LT(begin, end);
          for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i - 10)];
        });
        EXPECT_EQ(seen, std::vector<int>(seen.size(), 1)) << size << " by " << grain;
      }
    }
  }
}

TEST(ThreadExecutor, NoMorePiecesThanTheGrainAllows) {
  const ThreadExecutor executor(4);
  std::atomic<std::int64_t> smallest{1000};
  executor.parallel_for(0, 1000, 300, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t least = smallest;
    while (end - begin < least && !smallest.compare_exchange_weak(least, end - begin)) {
    }
  });
  EXPECT_GE(smallest, 250);  // four pieces at most
}

TEST(ThreadExecutor, ManyLoopsInTurnSeeWhatTheLastOneWrote) {
  const ThreadExecutor executor(3);
  std::vector<std::int64_t> values(257, 0);
  for (int round = 0; round < 300; ++round) {
    executor.parallel_for(0, 257, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) values[static_cast<std::size_t>(i)] += i;
    });
  }
  EXPECT_EQ(std::accumulate(values.begin(), values.end(), std::int64_t{0}), 300 * 256 * 257 / 2);
}

TEST(ThreadExecutor, WaitsForTheBodiesOfOtherThreads) {
  const ThreadExecutor executor(3);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> joined{false};
  std::atomic<int> done{0};
  executor.parallel_for(0, 12, 1, [&](std::int64_t begin, std::int64_t end) {
    if (std::this_thread::get_id() == caller) {
      while (!joined) std::this_thread::yield();
    } else {
      joined = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    done += static_cast<int>(end - begin);
  });
  EXPECT_EQ(done, 12);
}

TEST(ThreadExecutor, LoopsInsideABodyRunOnItsThread) {
  const ThreadExecutor executor(3);
  std::atomic<int> calls{0};
  executor.parallel_for(0, 12, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::thread::id own = std::this_thread::get_id();
    for (std::int64_t i = begin; i < end; ++i) {
      executor.parallel_for(0, 100, 1, [&](std::int64_t, std::int64_t) {
        EXPECT_EQ(std::this_thread::get_id(), own);
        ++calls;
      });
    }
  });
  EXPECT_EQ(calls, 12);
}

TEST(ThreadExecutor, AnErrorArrivesAndTheNextLoopRuns) {
  const ThreadExecutor executor(3);
  std::atomic<std::int64_t> others{0};
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    if (begin == 0) throw std::runtime_error("first piece");
    others += end - begin;
  };
  EXPECT_THROW(executor.parallel_for(0, 100, 1, body), std::runtime_error);
  EXPECT_GT(others, 0);  // what was begun is finished before the error is thrown
  others = 0;
  executor.parallel_for(1, 100, 1, body);
  EXPECT_EQ(others, 99);
}

}  // namespace
}  // namespace quantal::tools

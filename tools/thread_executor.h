// The tool's executor: one pool of threads for the process.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "quantal/core.h"

namespace quantal::tools {

/// Runs bodies on `threads` threads, the calling one among them. A parallel_for inside a body runs
/// on the thread of that body.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int threads);  ///< below 1: as many as the machine has
  ~ThreadExecutor() override;
  int num_threads() const override { return static_cast<int>(workers_.size()) + 1; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override;

 private:
  struct Work;
  void run_worker();

  std::vector<std::thread> workers_;
  mutable std::mutex mutex_;
  mutable std::condition_variable wake_, idle_;
  mutable std::shared_ptr<Work> work_;  ///< what workers join; null between calls
  bool stop_ = false;
};

}  // namespace quantal::tools

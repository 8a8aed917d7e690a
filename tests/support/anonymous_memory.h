// Peak of this process's anonymous memory while something runs.
#pragma once

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <string>
#include <thread>

namespace quantal::testing {

/// RssAnon of /proc/self/status in bytes; 0 where there is no such file.
inline std::int64_t anonymous_bytes() {
  std::ifstream in("/proc/self/status");
  for (std::string word; in >> word;) {
    std::int64_t kib = 0;
    if (word == "RssAnon:" && in >> kib) return kib * 1024;
  }
  return 0;
}

/// Samples every half millisecond in a thread of its own, beside what is in use at construction.
class AnonymousPeak {
 public:
  AnonymousPeak() {
    ::malloc_trim(0);
    base_ = anonymous_bytes();
    sampler_ = std::thread([this] {
      while (!done_) {
        see();
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
  }
  ~AnonymousPeak() { stop(); }
  AnonymousPeak(const AnonymousPeak&) = delete;
  AnonymousPeak& operator=(const AnonymousPeak&) = delete;

  std::int64_t stop() {
    done_ = true;
    if (sampler_.joinable()) sampler_.join();
    see();
    return peak_;
  }

 private:
  void see() { peak_ = std::max(peak_.load(), anonymous_bytes() - base_); }

  std::int64_t base_ = 0;
  std::atomic<std::int64_t> peak_{0};
  std::atomic<bool> done_{false};
  std::thread sampler_;
};

}  // namespace quantal::testing

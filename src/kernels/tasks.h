// Work that is cut into tasks only where it is worth it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include "quantal/core.h"

namespace quantal {

/// body(begin, end) for all of `units`: on the calling thread if `grain` of them are a task, else
/// by the executor. The body goes by reference: std::function would copy its captures to the heap.
template <class Body>
void run_tasks(const Executor& executor, std::int64_t units, std::int64_t grain, Body body) {
  if (units <= grain) {
    body(0, units);
  } else {
    executor.parallel_for(0, units, grain, std::ref(body));
  }
}

/// run_tasks whose threads take pieces of the units until none is left, smaller and smaller ones,
/// so that one that wakes late or has to make way for another program does not hold up the rest.
/// For work whose results no cut changes.
template <class Body>
void share_tasks(const Executor& executor, std::int64_t units, std::int64_t grain, Body body) {
  const std::int64_t tasks = (units + grain - 1) / grain;
  const std::int64_t threads = std::min<std::int64_t>(executor.num_threads(), tasks);
  if (threads <= 1) return body(0, units);
  // Each piece begins with empty caches: few, the first ones large. The last ones are what threads
  // may end apart by.
  const std::int64_t least = std::max(grain, units / (32 * threads));
  std::atomic<std::int64_t> next{0};
  const auto take = [&](std::int64_t /*begin*/, std::int64_t /*end*/) {
    for (std::int64_t begin = next.load(std::memory_order_relaxed); begin < units;) {
      const std::int64_t share = 3 * (units - begin) / (4 * threads);  // of what is left
      const std::int64_t end = std::min(begin + std::max(least, share), units);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  };
  executor.parallel_for(0, threads, 1, std::ref(take));
}

}  // namespace quantal

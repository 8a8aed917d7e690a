// Work that is cut into tasks only where it is worth it.
#pragma once

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

}  // namespace quantal

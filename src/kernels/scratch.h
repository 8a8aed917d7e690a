// Memory that threads keep from product to product.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "quantal/core.h"

namespace quantal {

/// What a thread's scratch is for: activations of a product, what its tasks work in, the keys that
/// queries see.
enum class Scratch { kInputs, kSums, kRuns };

/// Memory that the calling thread keeps from product to product, whole cache lines: nothing is
/// allocated once it has grown. Valid until the thread asks for the same again. Throws
/// std::bad_alloc.
template <Scratch kUse>
void* thread_scratch(std::int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    const std::int64_t rounded = ceil_div(bytes, 4096) * 4096;
    memory.reset(std::aligned_alloc(64, static_cast<std::size_t>(rounded)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

}  // namespace quantal

// operator new and delete of the test programs that ask for AllocationPeak.
#include "support/allocation.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<bool> counting{false};
std::atomic<long long> in_use{0};
std::atomic<long long> most{0};

void* take(std::size_t bytes, std::size_t alignment) {
  void* block =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(bytes == 0 ? 1 : bytes)
          : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (block == nullptr) throw std::bad_alloc();
  if (counting.load(std::memory_order_relaxed)) {
    const auto size = static_cast<long long>(::malloc_usable_size(block));
    const long long now = in_use.fetch_add(size) + size;
    long long before = most.load();
    while (now > before && !most.compare_exchange_weak(before, now)) {
    }
  }
  return block;
}

void give(void* block) noexcept {
  if (block == nullptr) return;
  if (counting.load(std::memory_order_relaxed)) {
    in_use.fetch_sub(static_cast<long long>(::malloc_usable_size(block)));
  }
  std::free(block);
}

}  // namespace

void* operator new(std::size_t bytes) { return take(bytes, 1); }
// std::stable_sort takes its buffer so, and gives it back to the plain delete.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return take(bytes, 1);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return take(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* block) noexcept { give(block); }
void operator delete(void* block, const std::nothrow_t&) noexcept { give(block); }
void operator delete(void* block, std::size_t) noexcept { give(block); }
void operator delete(void* block, std::align_val_t) noexcept { give(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { give(block); }

namespace quantal::testing {

AllocationPeak::AllocationPeak() {
  in_use = 0;
  most = 0;
  counting = true;
}

AllocationPeak::~AllocationPeak() { counting = false; }

std::size_t AllocationPeak::bytes() const {
  return static_cast<std::size_t>(std::max(0LL, most.load()));
}

}  // namespace quantal::testing

#include "core/result_block.h"

#include <array>
#include <atomic>
#include <new>

#include "quantal/core.h"

namespace quantal {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

/// A released block; this header lies in its own first bytes.
struct Released {
  std::size_t bytes;
};

std::array<std::atomic<Released*>, 8> slots{};
std::atomic<std::size_t> kept{0};

std::size_t whole_pages(std::size_t bytes) noexcept {
  return (bytes + kLargePage - 1) / kLargePage * kLargePage;
}

void free_block(void* data) noexcept { ::operator delete (data, std::align_val_t{kLargePage}); }

/// Takes what a slot holds; the block no longer counts as kept.
Released* taken(std::atomic<Released*>& slot) noexcept {
  Released* block = slot.exchange(nullptr, std::memory_order_acquire);
  if (block != nullptr) kept.fetch_sub(block->bytes, std::memory_order_relaxed);
  return block;
}

/// Whether there was room for it.
bool keep(Released* block) noexcept {
  const std::size_t bytes = block->bytes;
  if (kept.fetch_add(bytes, std::memory_order_relaxed) + bytes <= kKeptResultBytes) {
    for (auto& slot : slots) {
      Released* expected = nullptr;
      if (slot.compare_exchange_strong(expected, block, std::memory_order_release,
                                       std::memory_order_relaxed)) {
        return true;
      }
    }
  }
  kept.fetch_sub(bytes, std::memory_order_relaxed);
  return false;
}

}  // namespace

void* take_result_block(std::size_t bytes) {
  const std::size_t whole = whole_pages(bytes);
  for (auto& slot : slots) {
    Released* block = taken(slot);
    if (block == nullptr) continue;
    if (block->bytes == whole) return block;
    if (!keep(block)) free_block(block);
  }
  void* data = ::operator new (whole, std::align_val_t{kLargePage});
  prefer_large_pages(data, whole);
  return data;
}

void release_result_block(void* data, std::size_t bytes) noexcept {
  const std::size_t whole = whole_pages(bytes);
  if (whole > kKeptResultBytes) return free_block(data);
  auto* const block = new (data) Released{whole};
  if (keep(block)) return;
  // Older ones make room: the next result is likeliest of the size of the last.
  for (auto& slot : slots) {
    if (Released* old = taken(slot)) free_block(old);
  }
  if (!keep(block)) free_block(block);
}

std::size_t kept_result_bytes() noexcept { return kept.load(std::memory_order_relaxed); }

}  // namespace quantal

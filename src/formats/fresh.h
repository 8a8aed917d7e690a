// Memory between the passes of a quantizer.
#pragma once

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace quantal {

/// Leaves new elements without a value.
template <class T>
struct FreshAllocator : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = FreshAllocator<U>;
  };
  template <class U>
  void construct(U* p) noexcept {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
};

/// A vector whose elements have no value until something is written to them. One thread that fills
/// memory with zeros keeps all others waiting, and takes the faults of its pages alone.
template <class T>
using FreshVector = std::vector<T, FreshAllocator<T>>;

}  // namespace quantal

// How much memory a piece of code allocates, for readers that must not believe a file's sizes.
#pragma once

#include <cstddef>

namespace quantal::testing {

/// Counts what operator new hands out, in all threads, from its construction on. Mappings of files
/// and what C libraries allocate do not count. One at a time.
class AllocationPeak {
 public:
  AllocationPeak();
  ~AllocationPeak();
  AllocationPeak(const AllocationPeak&) = delete;
  AllocationPeak& operator=(const AllocationPeak&) = delete;
  /// The most bytes that were in use at once, beyond those in use at construction.
  std::size_t bytes() const;
};

}  // namespace quantal::testing

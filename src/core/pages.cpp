#include <cstdint>

#include "quantal/core.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace quantal {

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__)
  constexpr std::size_t kWorthwhile = std::size_t{4} << 20;
  if (bytes < kWorthwhile) return;
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  auto* const begin = static_cast<std::uint8_t*>(data);
  const std::size_t skipped = (page - reinterpret_cast<std::uintptr_t>(begin) % page) % page;
  madvise(begin + skipped, (bytes - skipped) / page * page,
          MADV_HUGEPAGE);  // a refusal is no error
#endif
}

}  // namespace quantal

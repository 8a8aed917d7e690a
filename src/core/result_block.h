#pragma once

#include <cstddef>

namespace quantal {

/// Results from this size on are worth a block of their own.
inline constexpr std::size_t kSmallestResultBlock = std::size_t{4} << 20;
/// Released blocks that stay with the process, all together.
inline constexpr std::size_t kKeptResultBytes = std::size_t{64} << 20;

/// Memory for a large result, aligned to and rounded up to large pages of 2 MiB. A system hands out
/// memory cleared, page by page, which takes several times as long as decoding into it; so the last
/// blocks released stay with the process, at most `kKeptResultBytes`, and serve the next results of
/// their size. Safe from several threads, without a lock. Throws std::bad_alloc.
void* take_result_block(std::size_t bytes);
/// Gives back what `take_result_block(bytes)` returned.
void release_result_block(void* data, std::size_t bytes) noexcept;

/// Bytes of released blocks that the process holds now.
std::size_t kept_result_bytes() noexcept;

}  // namespace quantal

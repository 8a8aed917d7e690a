// Little-endian reading of a file that may lie: every read is checked against the end.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <string>

#include "quantal/core.h"

namespace quantal::io {

/// Dimensions that numpy and torch allow; no tensor of a model has as many.
inline constexpr std::size_t kMostDimensions = 64;

/// A cursor over the bytes of a file. All failures are Error{kCorrupt} with path and offset.
class ByteReader {
 public:
  ByteReader(std::span<const std::uint8_t> bytes, std::string format, const std::string& path)
      : bytes_(bytes), format_(std::move(format)), path_(path) {}

  std::int64_t offset() const { return static_cast<std::int64_t>(at_); }
  std::uint64_t remaining() const { return bytes_.size() - at_; }

  /// The next `size` bytes; `what` names them in the message.
  std::span<const std::uint8_t> take(std::uint64_t size, const char* what) {
    if (size > remaining()) {
      fail(Errc::kCorrupt,
           format_ + ": " + what + " needs " + std::to_string(size) + " bytes, expected at most " +
               std::to_string(remaining()) + ", the rest of the file",
           {.path = path_, .tensor = subject_, .offset = offset()});
    }
    const auto out = bytes_.subspan(at_, static_cast<std::size_t>(size));
    at_ += static_cast<std::size_t>(size);
    return out;
  }

  /// An unsigned little-endian integer of `size` bytes (1 to 8).
  std::uint64_t unsigned_le(std::uint64_t size, const char* what) {
    std::uint64_t value = 0;
    unsigned shift = 0;
    for (const std::uint8_t byte : take(size, what)) {
      value |= static_cast<std::uint64_t>(byte) << shift;
      shift += 8;
    }
    return value;
  }

  std::uint32_t u32(const char* what) { return static_cast<std::uint32_t>(unsigned_le(4, what)); }
  std::uint64_t u64(const char* what) { return unsigned_le(8, what); }

  /// u64 length, then that many bytes.
  std::string string(const char* what) {
    const auto bytes = take(u64(what), what);
    return {bytes.begin(), bytes.end()};
  }

  /// Name of the tensor or key being read, for messages.
  void set_subject(std::string subject) { subject_ = std::move(subject); }
  const std::string& subject() const { return subject_; }
  const std::string& path() const { return path_; }

  [[noreturn]] void bad(const std::string& message, std::int64_t at) const {
    fail(Errc::kCorrupt, format_ + ": " + message,
         {.path = path_, .tensor = subject_, .offset = at});
  }

 private:
  std::span<const std::uint8_t> bytes_;
  std::string format_;
  const std::string& path_;
  std::string subject_;
  std::size_t at_ = 0;
};

}  // namespace quantal::io

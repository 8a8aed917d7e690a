// A file that appears whole or not at all.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "quantal/core.h"

namespace quantal::io {

/// Throws Error{kIo} "<where>: <what the system said>" for the current errno.
[[noreturn]] void fail_errno(const std::string& where, const std::string& path);

/// Makes a rename inside `folder` durable; a filesystem that cannot sync folders is not an error.
void sync_folder(const std::string& folder);

/// Writes into a temporary file beside `path`; `commit` syncs it and renames it over `path`. A
/// destructor without `commit` removes the temporary file and leaves `path` as it was.
/// Not thread-safe; two writers of one path do not disturb each other, the last rename wins.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);  ///< throws Error{kIo}
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::uint8_t> bytes);  ///< appends; throws Error{kIo}
  void write(std::string_view text);
  std::uint64_t size() const { return size_; }  ///< bytes that `write` has appended
  /// Writes inside or beyond what is there, without moving the end that `write` appends to.
  void write_at(std::uint64_t offset, std::span<const std::uint8_t> bytes);
  /// Syncs and closes; only `commit` may follow. Keeps descriptors low where many files are open.
  void seal();
  void commit();  ///< throws Error{kIo}

 private:
  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

}  // namespace quantal::io

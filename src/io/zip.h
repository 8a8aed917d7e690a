// Zip archives as numpy and torch write them: a strict directory, members stored or deflated.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/atomic_file.h"
#include "quantal/io.h"

namespace quantal::io {

/// One file of an archive. All numbers were checked against the archive.
struct ZipMember {
  std::string name;
  bool deflated = false;
  std::uint32_t crc = 0;
  std::uint64_t packed_bytes = 0;
  std::uint64_t bytes = 0;
  std::uint64_t header_offset = 0;
  std::uint64_t data_offset = 0;
};

/// The directory of a mapped zip file. Two readers must not be able to see two different archives
/// in one file, so what other tools tolerate is refused: members that overlap or stand twice, local
/// headers that contradict the directory, bytes between directory and end, names that leave the
/// folder. Sizes that no deflate stream of the given length can have are refused before memory is
/// taken. Format: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5 (zip64 included).
class ZipArchive {
 public:
  /// Throws Error{kCorrupt}; Error{kUnsupported} for encrypted members, several disks and
  /// compression methods other than deflate.
  explicit ZipArchive(std::shared_ptr<MappedFile> file);

  const std::vector<ZipMember>& members() const { return members_; }
  const ZipMember* find(const std::string& name) const;  ///< nullptr if absent
  const std::shared_ptr<MappedFile>& file() const { return file_; }
  /// The text behind the end record, at most 65535 bytes of anything.
  const std::string& comment() const { return comment_; }

  /// The bytes as they stand in the file.
  std::span<const std::uint8_t> packed(const ZipMember& member) const;
  /// Checks a stored member's CRC-32 the first time. Throws Error{kCorrupt}. Thread-safe.
  void verify(const ZipMember& member) const;
  /// All bytes of a member, checked against size and CRC-32. Throws Error{kCorrupt}.
  std::vector<std::uint8_t> unpack(const ZipMember& member) const;
  /// The first min(most, member.bytes) bytes, unchecked. Throws Error{kCorrupt}.
  std::vector<std::uint8_t> unpack_head(const ZipMember& member, std::size_t most) const;

 private:
  std::shared_ptr<MappedFile> file_;
  std::string comment_;
  std::vector<ZipMember> members_;
  std::map<std::string, std::size_t> index_;
  std::unique_ptr<std::atomic<bool>[]> verified_;
};

/// CRC-32 as zip files use it, continuing from `crc` (0 at the beginning).
std::uint32_t zip_crc(std::uint32_t crc, std::span<const std::uint8_t> bytes);

/// Writes an archive of stored members, atomically. Same members, same bytes: no clock is read.
class ZipWriter {
 public:
  explicit ZipWriter(const std::string& path);
  /// Appends a member made of `head` and `body`, its data at a multiple of `alignment`. Throws
  /// Error{kConfig} for a name that a reader would refuse or that stands there already.
  void add(const std::string& name, std::span<const std::uint8_t> head,
           std::span<const std::uint8_t> body, std::uint64_t alignment = 1);
  void add(const std::string& name, std::string_view text);
  /// Throws Error{kConfig} for a comment of more than 65535 bytes; Error{kIo}.
  void finish(std::string_view comment = {});
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  AtomicFile file_;
  std::vector<ZipMember> members_;
  std::map<std::string, std::size_t> index_;
};

/// Empty if `name` is a legal member name: relative, '/' between parts, no "." or ".." part, no
/// backslash, no control character; else what is wrong with it.
std::string_view zip_name_fault(std::string_view name);

}  // namespace quantal::io

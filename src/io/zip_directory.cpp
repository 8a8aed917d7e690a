// Directory of a zip file: end record, central directory, local headers.
#include <algorithm>
#include <numeric>
#include <optional>

#include "io/byte_reader.h"
#include "io/zip.h"

namespace quantal::io {
namespace {

constexpr std::uint32_t kLocalSignature = 0x04034b50;
constexpr std::uint32_t kCentralSignature = 0x02014b50;
constexpr std::uint32_t kEndSignature = 0x06054b50;
constexpr std::uint32_t kEnd64Signature = 0x06064b50;
constexpr std::uint32_t kLocator64Signature = 0x07064b50;
constexpr std::uint32_t kDescriptorSignature = 0x08074b50;
constexpr std::size_t kEndBytes = 22;
constexpr std::size_t kLocator64Bytes = 20;
constexpr std::uint32_t kFull16 = 0xFFFF;
constexpr std::uint32_t kFull32 = 0xFFFFFFFF;
constexpr unsigned kEncrypted = 1u << 0;
constexpr unsigned kHasDescriptor = 1u << 3;
constexpr unsigned kPatched = 1u << 5;
constexpr unsigned kStrongEncryption = 1u << 6;
constexpr unsigned kMaskedHeaders = 1u << 13;
constexpr std::uint16_t kZip64Extra = 1;
// A deflate stream yields at most 258 bytes for 2 bits.
constexpr std::uint64_t kMostInflation = 258 * 8 / 2;

struct Directory {
  std::uint64_t entries = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  std::uint64_t end = 0;  ///< where the end record is
};

/// Reads the parts of a directory; every failure names path, member and offset.
class DirectoryReader {
 public:
  explicit DirectoryReader(const MappedFile& file) : file_(file.bytes()), path_(file.path()) {}

  std::vector<ZipMember> read(std::string& comment) {
    const Directory directory = find_directory();
    const auto behind = file_.subspan(directory.end + kEndBytes);
    comment.assign(behind.begin(), behind.end());
    ByteReader reader = at(directory.offset);
    const std::uint64_t end = directory.offset + directory.bytes;
    std::vector<ZipMember> members;
    for (std::uint64_t i = 0; i < directory.entries; ++i) {
      members.push_back(read_entry(reader));
    }
    if (static_cast<std::uint64_t>(reader.offset()) != end) {
      reader.bad("directory ends at " + std::to_string(reader.offset()) + ", expected " +
                     std::to_string(end),
                 reader.offset());
    }
    check_overlaps(members, directory.offset);
    return members;
  }

 private:
  ByteReader at(std::uint64_t offset) const {
    ByteReader reader(file_, "zip", path_);
    reader.take(offset, "offset");
    return reader;
  }

  [[noreturn]] void bad(const std::string& message, std::uint64_t offset) const {
    fail(Errc::kCorrupt, "zip: " + message,
         {.path = path_, .offset = static_cast<std::int64_t>(offset)});
  }

  static std::uint32_t u16(ByteReader& reader, const char* what) {
    return static_cast<std::uint32_t>(reader.unsigned_le(2, what));
  }

  std::uint32_t peek32(std::uint64_t offset) const { return at(offset).u32("signature"); }

  /// The last end record whose comment reaches exactly to the end of the file.
  std::uint64_t find_end() const {
    if (file_.size() < kEndBytes) {
      bad("file is " + std::to_string(file_.size()) + " bytes, expected at least 22", 0);
    }
    const std::size_t last = file_.size() - kEndBytes;
    const std::size_t first = last > kFull16 ? last - kFull16 : 0;
    for (std::size_t i = last + 1; i-- > first;) {
      if (file_[i] != 'P' || peek32(i) != kEndSignature) continue;
      const std::size_t comment = file_[i + 20] | static_cast<std::size_t>(file_[i + 21]) << 8;
      if (comment == last - i) return i;
    }
    bad("no end record is in the last 64 KiB, expected PK\\x05\\x06", last);
  }

  Directory find_directory() const {
    const std::uint64_t end = find_end();
    ByteReader reader = at(end + 4);
    const std::uint32_t disk = u16(reader, "disk number");
    const std::uint32_t first_disk = u16(reader, "disk of the directory");
    const std::uint32_t here = u16(reader, "entries on this disk");
    Directory found;
    found.end = end;
    found.entries = u16(reader, "number of entries");
    found.bytes = reader.u32("directory size");
    found.offset = reader.u32("directory offset");
    std::uint64_t after = end;
    const bool has64 =
        end >= kLocator64Bytes && peek32(end - kLocator64Bytes) == kLocator64Signature;
    if (has64) after = read_end64(end - kLocator64Bytes, found);
    if ((disk != 0 && !(has64 && disk == kFull16)) ||
        (first_disk != 0 && !(has64 && first_disk == kFull16)) ||
        (here != found.entries && !(has64 && here == kFull16))) {
      fail(Errc::kUnsupported, "zip: archive spans several disks, expected one file",
           {.path = path_, .offset = static_cast<std::int64_t>(end)});
    }
    if (found.offset > after || found.bytes != after - found.offset) {
      bad("directory is " + std::to_string(found.bytes) + " bytes at " +
              std::to_string(found.offset) + ", expected it to end at " + std::to_string(after),
          end);
    }
    constexpr std::uint64_t kLeastEntry = 46;
    if (found.entries > found.bytes / kLeastEntry) {
      bad("directory has " + std::to_string(found.entries) + " entries in " +
              std::to_string(found.bytes) + " bytes, expected at least 46 bytes for each",
          end);
    }
    return found;
  }

  /// Replaces full fields by those of the zip64 record; returns where that record begins.
  std::uint64_t read_end64(std::uint64_t locator, Directory& found) const {
    ByteReader reader = at(locator + 4);
    const std::uint32_t disk = reader.u32("disk of the zip64 record");
    const std::uint64_t offset = reader.u64("offset of the zip64 record");
    const std::uint32_t disks = reader.u32("number of disks");
    if (disk != 0 || disks > 1) {
      fail(Errc::kUnsupported, "zip: archive spans several disks, expected one file",
           {.path = path_, .offset = static_cast<std::int64_t>(locator)});
    }
    if (offset > locator || peek32(offset) != kEnd64Signature) {
      bad("no zip64 end record is at " + std::to_string(offset), locator);
    }
    ByteReader record = at(offset + 4);
    const std::uint64_t bytes = record.u64("size of the zip64 record");
    if (bytes < 44 || bytes != locator - offset - 12) {
      bad("zip64 end record is " + std::to_string(bytes) + " bytes, expected it to end at " +
              std::to_string(locator),
          offset);
    }
    record.take(4, "versions");
    const std::uint32_t this_disk = record.u32("disk number");
    const std::uint32_t first_disk = record.u32("disk of the directory");
    const std::uint64_t here = record.u64("entries on this disk");
    const std::uint64_t entries = record.u64("number of entries");
    if (this_disk != 0 || first_disk != 0 || here != entries) {
      fail(Errc::kUnsupported, "zip: archive spans several disks, expected one file",
           {.path = path_, .offset = static_cast<std::int64_t>(offset)});
    }
    merge(found.entries, kFull16, entries, "number of entries", offset);
    merge(found.bytes, kFull32, record.u64("directory size"), "directory size", offset);
    merge(found.offset, kFull32, record.u64("directory offset"), "directory offset", offset);
    return offset;
  }

  void merge(std::uint64_t& value, std::uint64_t full, std::uint64_t value64, const char* what,
             std::uint64_t offset) const {
    if (value != full && value != value64) {
      bad(std::string(what) + " is " + std::to_string(value64) + " in the zip64 record, expected " +
              std::to_string(value) + " as in the end record",
          offset);
    }
    value = value64;
  }

  ZipMember read_entry(ByteReader& reader) const {
    const auto begin = static_cast<std::uint64_t>(reader.offset());
    if (reader.u32("directory entry") != kCentralSignature) bad("no directory entry", begin);
    reader.take(4, "versions");
    const unsigned flags = u16(reader, "flags");
    const unsigned method = u16(reader, "compression method");
    reader.take(4, "time");
    ZipMember member;
    member.crc = reader.u32("CRC-32");
    member.packed_bytes = reader.u32("packed size");
    member.bytes = reader.u32("size");
    const std::uint32_t name_bytes = u16(reader, "name length");
    const std::uint32_t extra_bytes = u16(reader, "extra length");
    const std::uint32_t comment_bytes = u16(reader, "comment length");
    const std::uint32_t disk = u16(reader, "disk number");
    reader.take(6, "attributes");
    member.header_offset = reader.u32("header offset");
    const auto name = reader.take(name_bytes, "name");
    member.name.assign(name.begin(), name.end());
    const auto extra = reader.take(extra_bytes, "extra field");
    reader.take(comment_bytes, "comment");
    const ErrorSite site{
        .path = path_, .tensor = member.name, .offset = static_cast<std::int64_t>(begin)};
    const std::string_view fault = zip_name_fault(member.name);
    if (!fault.empty()) {
      fail(Errc::kCorrupt, "zip: member name " + std::string(fault) + ", expected a plain path",
           {.path = path_, .offset = static_cast<std::int64_t>(begin)});
    }
    read_extra64(extra, member, disk, site);
    check_method(flags, method, member, site);
    read_local(flags, method, member);
    return member;
  }

  /// Fields that are full in the entry stand in the zip64 field, in this order.
  void read_extra64(std::span<const std::uint8_t> extra, ZipMember& member, std::uint32_t disk,
                    const ErrorSite& site) const {
    const std::optional<std::span<const std::uint8_t>> field = find_extra(extra, site);
    ByteReader reader(field.value_or(std::span<const std::uint8_t>{}), "zip: zip64 field", path_);
    reader.set_subject(member.name);
    if (field) {
      if (member.bytes == kFull32) member.bytes = reader.u64("size");
      if (member.packed_bytes == kFull32) member.packed_bytes = reader.u64("packed size");
      if (member.header_offset == kFull32) member.header_offset = reader.u64("header offset");
      if (disk == kFull16) disk = reader.u32("disk number");
    }
    if (disk != 0) {
      fail(Errc::kUnsupported, "zip: member is on another disk, expected one file", site);
    }
  }

  static std::optional<std::span<const std::uint8_t>> find_extra(
      std::span<const std::uint8_t> extra, const ErrorSite& site) {
    std::optional<std::span<const std::uint8_t>> found;
    std::size_t i = 0;
    while (extra.size() - i >= 4) {
      const unsigned id = extra[i] | static_cast<unsigned>(extra[i + 1]) << 8;
      const std::size_t size = extra[i + 2] | static_cast<std::size_t>(extra[i + 3]) << 8;
      i += 4;
      if (size > extra.size() - i) {
        fail(Errc::kCorrupt,
             "zip: extra field is " + std::to_string(size) + " bytes, expected at most " +
                 std::to_string(extra.size() - i),
             site);
      }
      if (id == kZip64Extra) {
        if (found) fail(Errc::kCorrupt, "zip: zip64 field stands twice, expected once", site);
        found = extra.subspan(i, size);
      }
      i += size;
    }
    return found;
  }

  static void check_method(unsigned flags, unsigned method, ZipMember& member,
                           const ErrorSite& site) {
    if ((flags & (kEncrypted | kStrongEncryption | kMaskedHeaders)) != 0) {
      fail(Errc::kUnsupported, "zip: member is encrypted, expected plain data", site);
    }
    if ((flags & kPatched) != 0) {
      fail(Errc::kUnsupported, "zip: member is patch data, expected plain data", site);
    }
    if (method != 0 && method != 8) {
      fail(Errc::kUnsupported,
           "zip: compression method is " + std::to_string(method) +
               ", expected 0 (stored) or 8 (deflate)",
           site);
    }
    member.deflated = method == 8;
    if (!member.deflated && member.packed_bytes != member.bytes) {
      fail(Errc::kCorrupt,
           "zip: stored member is " + std::to_string(member.packed_bytes) + " bytes, expected " +
               std::to_string(member.bytes),
           site);
    }
    if (member.deflated && member.bytes / kMostInflation > member.packed_bytes) {
      fail(Errc::kCorrupt,
           "zip: member claims " + std::to_string(member.bytes) + " bytes from " +
               std::to_string(member.packed_bytes) + ", expected at most 1032 for each (zip bomb)",
           site);
    }
  }

  void read_local(unsigned flags, unsigned method, ZipMember& member) const {
    ByteReader reader = at(member.header_offset);
    reader.set_subject(member.name);
    const auto begin = reader.offset();
    if (reader.u32("local header") != kLocalSignature) {
      reader.bad("no local header, expected PK\\x03\\x04", begin);
    }
    reader.take(2, "version");
    const unsigned local_flags = u16(reader, "flags");
    const unsigned local_method = u16(reader, "compression method");
    reader.take(4, "time");
    const std::uint32_t crc = reader.u32("CRC-32");
    const std::uint32_t packed_bytes = reader.u32("packed size");
    const std::uint32_t bytes = reader.u32("size");
    const std::uint32_t name_bytes = u16(reader, "name length");
    const std::uint32_t extra_bytes = u16(reader, "extra length");
    const auto name = reader.take(name_bytes, "name");
    const auto extra = reader.take(extra_bytes, "extra field");
    member.data_offset = static_cast<std::uint64_t>(reader.offset());
    const bool described = (flags & kHasDescriptor) != 0;
    const bool same = local_method == method &&
                      ((local_flags ^ flags) & (kEncrypted | kHasDescriptor)) == 0 &&
                      std::equal(name.begin(), name.end(), member.name.begin(), member.name.end());
    const Sizes sizes = local_sizes(packed_bytes, bytes, extra, member.name);
    const bool later = described && crc == 0 && sizes.packed == 0 && sizes.plain == 0;
    const bool agree =
        crc == member.crc && sizes.packed == member.packed_bytes && sizes.plain == member.bytes;
    if (!same || !(agree || later)) {
      reader.bad("local header contradicts the directory in name, method, flags, size or CRC-32",
                 begin);
    }
    reader.take(member.packed_bytes, "member");
    if (described) check_descriptor(reader, member);
  }

  struct Sizes {
    std::uint64_t packed = 0;
    std::uint64_t plain = 0;
  };

  /// Sizes of a local header; full ones stand in its zip64 field, the plain size first.
  Sizes local_sizes(std::uint64_t packed, std::uint64_t plain, std::span<const std::uint8_t> extra,
                    const std::string& name) const {
    const auto field = find_extra(extra, {.path = path_, .tensor = name});
    if (field && (packed == kFull32 || plain == kFull32)) {
      ByteReader reader(*field, "zip: zip64 field", path_);
      if (plain == kFull32) plain = reader.u64("size");
      if (packed == kFull32) packed = reader.u64("packed size");
    }
    return {packed, plain};
  }

  /// CRC-32 and both sizes behind the data, 4 or 8 bytes each, with or without a signature.
  static void check_descriptor(const ByteReader& reader, const ZipMember& member) {
    for (const bool with_signature : {true, false}) {
      for (const std::uint64_t width : {4u, 8u}) {
        ByteReader attempt = reader;
        if (attempt.remaining() < (with_signature ? 8 : 4) + 2 * width) continue;
        if (with_signature && attempt.u32("signature") != kDescriptorSignature) continue;
        if (attempt.u32("CRC-32") == member.crc &&
            attempt.unsigned_le(width, "packed size") == member.packed_bytes &&
            attempt.unsigned_le(width, "size") == member.bytes) {
          return;
        }
      }
    }
    reader.bad("data descriptor contradicts the directory in size or CRC-32", reader.offset());
  }

  void check_overlaps(const std::vector<ZipMember>& members, std::uint64_t directory) const {
    std::vector<std::size_t> order(members.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return members[a].header_offset < members[b].header_offset;
    });
    std::uint64_t end = 0;
    for (const std::size_t i : order) {
      const ZipMember& member = members[i];
      if (member.header_offset < end || member.data_offset + member.packed_bytes > directory) {
        fail(Errc::kCorrupt, "zip: member overlaps another one or the directory",
             {.path = path_,
              .tensor = member.name,
              .offset = static_cast<std::int64_t>(member.header_offset)});
      }
      end = member.data_offset + member.packed_bytes;
    }
  }

  std::span<const std::uint8_t> file_;
  const std::string& path_;
};

}  // namespace

std::string_view zip_name_fault(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.front() == '/') return "begins with '/'";
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == '\x7F') return "has a control character";
    if (c == '\\') return "has a backslash";
  }
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('/', begin), name.size());
    const std::string_view part = name.substr(begin, end - begin);
    if (part == "." || part == "..") return "has a part \".\" or \"..\"";
    if (part.empty() && end != name.size()) return "has an empty part";
    begin = end + 1;
  }
  return {};
}

namespace {

/// Weights shrink by a few times at most: an archive that grows far beyond its size is a bomb, even
/// where its streams are what they say.
void check_growth(const MappedFile& file, const std::vector<ZipMember>& members) {
  constexpr std::uint64_t kMostGrowth = 100, kAlways = std::uint64_t{64} << 20;
  const std::uint64_t most = kMostGrowth * file.bytes().size() + kAlways;
  std::uint64_t bytes = 0;  // at most 1032 times the file: no overflow
  for (const ZipMember& member : members) {
    if (member.deflated) bytes += member.bytes;
  }
  if (bytes <= most) return;
  fail(Errc::kUnsupported,
       "zip: members unpack to " + std::to_string(bytes) + " bytes, expected at most " +
           std::to_string(most) + ", 64 MiB and 100 times the file (zip bomb)",
       {.path = file.path()});
}

}  // namespace

ZipArchive::ZipArchive(std::shared_ptr<MappedFile> file)
    : file_(std::move(file)), members_(DirectoryReader(*file_).read(comment_)) {
  check_growth(*file_, members_);
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (index_.emplace(members_[i].name, i).second) continue;
    fail(Errc::kCorrupt, "zip: member name stands twice, expected once",
         {.path = file_->path(),
          .tensor = members_[i].name,
          .offset = static_cast<std::int64_t>(members_[i].header_offset)});
  }
  verified_ = std::make_unique<std::atomic<bool>[]>(members_.size());
}

}  // namespace quantal::io

// Writing of stored zip members.
#include <algorithm>
#include <array>

#include "io/zip.h"

namespace quantal::io {
namespace {

constexpr std::uint64_t kFull16 = 0xFFFF;
constexpr std::uint64_t kFull32 = 0xFFFFFFFF;
constexpr std::uint64_t kUtf8Names = 1u << 11;
constexpr std::uint64_t kFirstDay = 0x21;  // 1980-01-01, the earliest date that a zip can hold
constexpr std::uint64_t kZip64Extra = 1;
// torch's own mark of padding ("FB"), which every reader skips.
constexpr std::uint64_t kPaddingExtra = 0x4246;
constexpr std::uint64_t kLocalBytes = 30;
constexpr std::uint64_t kExtraHead = 4;

/// Little-endian fields, one after the other.
class Fields {
 public:
  Fields& put(std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out_.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
    return *this;
  }
  Fields& put(std::string_view text) {
    out_.insert(out_.end(), text.begin(), text.end());
    return *this;
  }
  Fields& fill(std::uint64_t bytes) {
    out_.insert(out_.end(), static_cast<std::size_t>(bytes), std::uint8_t{0});
    return *this;
  }
  std::span<const std::uint8_t> bytes() const { return out_; }
  std::uint64_t size() const { return out_.size(); }

 private:
  std::vector<std::uint8_t> out_;
};

/// The fields from "version needed" to the length of the name, the same in both headers.
void put_common(Fields& out, const ZipMember& member, bool wide) {
  out.put(wide ? 45 : 20, 2).put(kUtf8Names, 2).put(0, 2).put(0, 2).put(kFirstDay, 2);
  out.put(member.crc, 4);
  out.put(wide ? kFull32 : member.packed_bytes, 4).put(wide ? kFull32 : member.bytes, 4);
  out.put(member.name.size(), 2);
}

Fields local_header(const ZipMember& member, std::uint64_t alignment) {
  const bool wide = member.bytes >= kFull32;
  const std::uint64_t extra64 = wide ? kExtraHead + 16 : 0;
  const std::uint64_t fixed = member.header_offset + kLocalBytes + member.name.size() + extra64;
  std::uint64_t padding = 0;
  if (fixed % alignment != 0) {
    padding = kExtraHead + (alignment - (fixed + kExtraHead) % alignment) % alignment;
  }
  Fields out;
  out.put(0x04034b50, 4);
  put_common(out, member, wide);
  out.put(extra64 + padding, 2).put(member.name);
  if (wide) out.put(kZip64Extra, 2).put(16, 2).put(member.bytes, 8).put(member.packed_bytes, 8);
  if (padding != 0) {
    out.put(kPaddingExtra, 2).put(padding - kExtraHead, 2).fill(padding - kExtraHead);
  }
  return out;
}

Fields directory_entry(const ZipMember& member) {
  const bool wide = member.bytes >= kFull32;
  const bool far = member.header_offset >= kFull32;
  const std::uint64_t extra = (wide ? 16u : 0u) + (far ? 8u : 0u);
  Fields out;
  out.put(0x02014b50, 4).put(wide || far ? 45 : 20, 2);
  put_common(out, member, wide);
  out.put(extra == 0 ? 0 : kExtraHead + extra, 2).put(0, 2).put(0, 2).put(0, 2).put(0, 4);
  out.put(far ? kFull32 : member.header_offset, 4).put(member.name);
  if (extra != 0) out.put(kZip64Extra, 2).put(extra, 2);
  if (wide) out.put(member.bytes, 8).put(member.packed_bytes, 8);
  if (far) out.put(member.header_offset, 8);
  return out;
}

Fields end_records(std::uint64_t entries, std::uint64_t bytes, std::uint64_t offset,
                   std::string_view comment) {
  Fields out;
  if (entries >= kFull16 || bytes >= kFull32 || offset >= kFull32) {
    out.put(0x06064b50, 4).put(44, 8).put(45, 2).put(45, 2).put(0, 4).put(0, 4);
    out.put(entries, 8).put(entries, 8).put(bytes, 8).put(offset, 8);
    out.put(0x07064b50, 4).put(0, 4).put(offset + bytes, 8).put(1, 4);
  }
  out.put(0x06054b50, 4).put(0, 2).put(0, 2);
  out.put(std::min(entries, kFull16), 2).put(std::min(entries, kFull16), 2);
  out.put(std::min(bytes, kFull32), 4).put(std::min(offset, kFull32), 4);
  out.put(comment.size(), 2).put(comment);
  return out;
}

}  // namespace

ZipWriter::ZipWriter(const std::string& path) : path_(path), file_(path) {}

void ZipWriter::add(const std::string& name, std::span<const std::uint8_t> head,
                    std::span<const std::uint8_t> body, std::uint64_t alignment) {
  const ErrorSite site{.path = path_, .tensor = name};
  const std::string_view fault = zip_name_fault(name);
  if (!fault.empty() || name.size() >= kFull16) {
    fail(Errc::kConfig,
         "zip: member name " + std::string(fault.empty() ? "is longer than 65534 bytes" : fault),
         site);
  }
  if (!index_.emplace(name, members_.size()).second) {
    fail(Errc::kConfig, "zip: member name is given twice, expected once", site);
  }
  ZipMember member;
  member.name = name;
  member.crc = zip_crc(zip_crc(0, head), body);
  member.bytes = member.packed_bytes = head.size() + body.size();
  member.header_offset = file_.size();
  const Fields header = local_header(member, alignment);
  member.data_offset = member.header_offset + header.size();
  file_.write(header.bytes());
  file_.write(head);
  file_.write(body);
  members_.push_back(std::move(member));
}

void ZipWriter::add(const std::string& name, std::string_view text) {
  add(name, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}, {});
}

void ZipWriter::finish(std::string_view comment) {
  if (comment.size() > kFull16) {
    fail(Errc::kConfig,
         "zip: comment is " + std::to_string(comment.size()) + " bytes, expected at most 65535",
         {.path = path_});
  }
  const std::uint64_t offset = file_.size();
  for (const ZipMember& member : members_) file_.write(directory_entry(member).bytes());
  file_.write(end_records(members_.size(), file_.size() - offset, offset, comment).bytes());
  file_.commit();
}

}  // namespace quantal::io

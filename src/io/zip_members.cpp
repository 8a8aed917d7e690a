// Reading members of a zip file.
#include <zlib.h>

#include <algorithm>
#include <limits>

#include "io/zip.h"

namespace quantal::io {
namespace {

/// zlib counts with unsigned int.
uInt chunk(std::size_t bytes) {
  return static_cast<uInt>(std::min<std::size_t>(bytes, std::numeric_limits<uInt>::max()));
}

/// A raw deflate stream over bytes that outlive it.
class Inflater {
 public:
  explicit Inflater(std::span<const std::uint8_t> in) : in_(in) {
    if (inflateInit2(&stream_, -MAX_WBITS) != Z_OK) {
      fail(Errc::kInternal, "zip: zlib cannot begin to inflate");
    }
  }
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  /// Fills `out` as far as the stream reaches and returns how far. `ended` tells whether the stream
  /// is over; `fault` is set where it is damaged.
  std::size_t read(std::span<std::uint8_t> out) {
    std::size_t done = 0;
    while (!ended_) {
      if (stream_.avail_in == 0 && taken_ < in_.size()) {
        stream_.avail_in = chunk(in_.size() - taken_);
        // zlib does not write through next_in; its type lacks const unless ZLIB_CONST is set.
        stream_.next_in = const_cast<Bytef*>(in_.data() + taken_);
        taken_ += stream_.avail_in;
      }
      const uInt room = chunk(out.size() - done);
      stream_.next_out = out.data() + done;
      stream_.avail_out = room;
      const int code = inflate(&stream_, Z_NO_FLUSH);
      done += room - stream_.avail_out;
      if (code == Z_STREAM_END) {
        ended_ = true;
      } else if (code != Z_OK || (stream_.avail_out != 0 && taken_ == in_.size())) {
        return done;  // damaged, out of input, or out of room
      } else if (done == out.size() && stream_.avail_in == 0 && taken_ == in_.size()) {
        return done;
      }
    }
    return done;
  }

  /// The stream is over and its input is used up.
  bool complete() const { return ended_ && taken_ == in_.size() && stream_.avail_in == 0; }

 private:
  std::span<const std::uint8_t> in_;
  z_stream stream_{};
  std::size_t taken_ = 0;
  bool ended_ = false;
};

ErrorSite site_of(const MappedFile& file, const ZipMember& member) {
  return {.path = file.path(),
          .tensor = member.name,
          .offset = static_cast<std::int64_t>(member.data_offset)};
}

void check_crc(const MappedFile& file, const ZipMember& member,
               std::span<const std::uint8_t> bytes) {
  const std::uint32_t actual = zip_crc(0, bytes);
  if (actual == member.crc) return;
  fail(Errc::kCorrupt,
       "zip: CRC-32 of the member is " + std::to_string(actual) + ", expected " +
           std::to_string(member.crc),
       site_of(file, member));
}

}  // namespace

std::uint32_t zip_crc(std::uint32_t crc, std::span<const std::uint8_t> bytes) {
  uLong sum = crc;
  while (!bytes.empty()) {
    const uInt part = chunk(bytes.size());
    sum = crc32(sum, bytes.data(), part);
    bytes = bytes.subspan(part);
  }
  return static_cast<std::uint32_t>(sum);
}

const ZipMember* ZipArchive::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &members_[found->second];
}

std::span<const std::uint8_t> ZipArchive::packed(const ZipMember& member) const {
  return file_->bytes().subspan(static_cast<std::size_t>(member.data_offset),
                                static_cast<std::size_t>(member.packed_bytes));
}

void ZipArchive::verify(const ZipMember& member) const {
  std::atomic<bool>& verified = verified_[static_cast<std::size_t>(&member - members_.data())];
  if (verified.load(std::memory_order_relaxed)) return;
  check_crc(*file_, member, packed(member));
  verified.store(true, std::memory_order_relaxed);
}

std::vector<std::uint8_t> ZipArchive::unpack(const ZipMember& member) const {
  const auto in = packed(member);
  if (!member.deflated) {
    verify(member);
    return {in.begin(), in.end()};
  }
  // Memory follows what comes out, not what the directory promises.
  constexpr std::size_t kFirst = std::size_t{1} << 20;
  const auto promised = static_cast<std::size_t>(member.bytes);
  std::vector<std::uint8_t> out(std::min(promised, 4 * in.size() + kFirst));
  Inflater inflater(in);
  std::size_t done = inflater.read(out);
  while (done == out.size() && done < promised) {
    out.resize(std::min(promised, 2 * done));
    done += inflater.read(std::span(out).subspan(done));
  }
  std::uint8_t more = 0;  // the end of a stream may lie behind its last byte
  if (!inflater.complete()) done += inflater.read({&more, 1});
  if (!inflater.complete() || done != promised) {
    fail(Errc::kCorrupt,
         "zip: deflated member is damaged or not of its size, expected " +
             std::to_string(member.bytes) + " bytes",
         site_of(*file_, member));
  }
  check_crc(*file_, member, out);
  return out;
}

std::vector<std::uint8_t> ZipArchive::unpack_head(const ZipMember& member, std::size_t most) const {
  const auto in = packed(member);
  const auto bytes = static_cast<std::size_t>(std::min<std::uint64_t>(most, member.bytes));
  if (!member.deflated) return {in.begin(), in.begin() + static_cast<std::ptrdiff_t>(bytes)};
  std::vector<std::uint8_t> out(bytes);
  Inflater inflater(in);
  if (inflater.read(out) != bytes) {
    fail(Errc::kCorrupt, "zip: deflated member is damaged", site_of(*file_, member));
  }
  return out;
}

}  // namespace quantal::io

// Zip files and pickles made by hand, right or wrong.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace quantal::testing {

/// `bytes` bytes of a number, little-endian.
inline std::string le(std::uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i) & 0xFF);
  return out;
}

inline std::uint32_t crc_of(std::string_view data) {
  return static_cast<std::uint32_t>(
      crc32(0, reinterpret_cast<const Bytef*>(data.data()), static_cast<uInt>(data.size())));
}

/// A raw deflate stream.
inline std::string deflated(std::string_view data) {
  z_stream stream{};
  deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 9, Z_DEFAULT_STRATEGY);
  std::string out(data.size() + 1024, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

/// One member; every field can lie.
struct ZipEntry {
  std::string name;
  std::string data;  ///< as it stands in the file
  std::uint64_t crc = 0;
  std::uint64_t packed = 0;
  std::uint64_t size = 0;
  std::uint64_t method = 0;
  std::uint64_t flags = 0;
  std::uint64_t disk = 0;
  std::string extra{};        ///< of the directory
  std::string local_extra{};  ///< of the local header
  std::string local_name{};   ///< if not `name`
  std::string descriptor{};   ///< behind the data
  std::int64_t offset = -1;   ///< claimed place, if not the true one
  std::uint64_t local_size = ~std::uint64_t{0};
};

inline ZipEntry stored_entry(const std::string& name, const std::string& data) {
  return {
      .name = name, .data = data, .crc = crc_of(data), .packed = data.size(), .size = data.size()};
}

inline ZipEntry deflated_entry(const std::string& name, const std::string& data) {
  ZipEntry entry = stored_entry(name, data);
  entry.data = deflated(data);
  entry.packed = entry.data.size();
  entry.method = 8;
  return entry;
}

struct ZipEnd {
  std::int64_t entries = -1;
  std::int64_t bytes = -1;
  std::int64_t offset = -1;
  std::uint64_t disk = 0;
  std::string comment{};
  std::string before{};  ///< between directory and end record
};

inline std::string zip_of(const std::vector<ZipEntry>& entries, const ZipEnd& end = {}) {
  std::string out, directory;
  for (const ZipEntry& e : entries) {
    const std::uint64_t at = e.offset < 0 ? out.size() : static_cast<std::uint64_t>(e.offset);
    const std::string name = e.local_name.empty() ? e.name : e.local_name;
    const bool later = (e.flags & 8) != 0;
    const std::uint64_t size = e.local_size != ~std::uint64_t{0} ? e.local_size
                               : later                           ? 0
                                                                 : e.size;
    out += "PK\x03\x04" + le(20, 2) + le(e.flags, 2) + le(e.method, 2) + le(0, 4) +
           le(later ? 0 : e.crc, 4) + le(later ? 0 : e.packed, 4) + le(size, 4) +
           le(name.size(), 2) + le(e.local_extra.size(), 2) + name + e.local_extra + e.data +
           e.descriptor;
    directory += "PK\x01\x02" + le(20, 2) + le(20, 2) + le(e.flags, 2) + le(e.method, 2) +
                 le(0, 4) + le(e.crc, 4) + le(e.packed, 4) + le(e.size, 4) + le(e.name.size(), 2) +
                 le(e.extra.size(), 2) + le(0, 2) + le(e.disk, 2) + le(0, 2) + le(0, 4) +
                 le(at, 4) + e.name + e.extra;
  }
  const auto or_true = [](std::int64_t claimed, std::size_t truth) {
    return claimed < 0 ? static_cast<std::uint64_t>(truth) : static_cast<std::uint64_t>(claimed);
  };
  const std::size_t offset = out.size();
  const std::uint64_t count = or_true(end.entries, entries.size());
  return out + directory + end.before + "PK\x05\x06" + le(end.disk, 2) + le(end.disk, 2) +
         le(count, 2) + le(count, 2) + le(or_true(end.bytes, directory.size()), 4) +
         le(or_true(end.offset, offset), 4) + le(end.comment.size(), 2) + end.comment;
}

// ------------------------------------------------------------------ pickles

inline std::string p_text(std::string_view text) {
  return "X" + le(text.size(), 4) + std::string(text);
}
inline std::string p_int(std::uint64_t value) {
  return value < 256 ? "K" + le(value, 1) : "\x8a\x08" + le(value, 8);
}
inline std::string p_global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
inline std::string p_tuple(const std::vector<std::uint64_t>& values) {
  std::string out = "(";
  for (const std::uint64_t value : values) out += p_int(value);
  return out + "t";
}

/// Parts of a tensor's pickle; each can be replaced.
struct TensorPickle {
  std::string key = "0";
  std::uint64_t numel = 6;
  std::string storage = p_global("torch", "FloatStorage");
  std::uint64_t offset = 0;
  std::string shape = p_tuple({2, 3});
  std::string strides = p_tuple({3, 1});
  std::string requires_grad = "\x89";
  std::string hooks = p_global("collections", "OrderedDict") + ")R";
  std::string more{};  ///< arguments behind the hooks
  std::string function = "_rebuild_tensor_v2";

  std::string text() const {
    return p_global("torch._utils", function) + "((" + p_text("storage") + storage + p_text(key) +
           p_text("cpu") + p_int(numel) + "tQ" + p_int(offset) + shape + strides + requires_grad +
           hooks + more + "tR";
  }
};

/// A torch file around a pickle body (PROTO and STOP are added) and storages "0", "1" ...
inline std::vector<ZipEntry> torch_entries(const std::string& body,
                                           const std::vector<std::string>& storages = {}) {
  std::vector<ZipEntry> out = {stored_entry("x/data.pkl", "\x80\x02" + body + "."),
                               stored_entry("x/byteorder", "little")};
  for (std::size_t i = 0; i < storages.size(); ++i) {
    out.push_back(stored_entry("x/data/" + std::to_string(i), storages[i]));
  }
  out.push_back(stored_entry("x/version", "3\n"));
  return out;
}

}  // namespace quantal::testing

#include "io/gguf_metadata.h"

#include <bit>
#include <set>

namespace quantal::io {
namespace {

/// Bytes of a value, for strings and arrays the least they can take; 0 = not a type.
std::uint64_t min_bytes(std::uint32_t type) {
  static constexpr std::uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return type < sizeof kBytes ? kBytes[type] : 0;
}

void check_type(const ByteReader& reader, std::uint32_t type, std::int64_t at) {
  if (min_bytes(type) == 0) {
    reader.bad("metadata type is " + std::to_string(type) + ", expected 0 to 12", at);
  }
}

std::int64_t sign_extend(std::uint64_t value, std::uint64_t bytes) {
  const unsigned shift = static_cast<unsigned>(64 - 8 * bytes);
  return static_cast<std::int64_t>(value << shift) >> shift;
}

/// A value that is neither array nor unknown.
GgufValue read_plain(ByteReader& reader, std::uint32_t number) {
  const auto type = static_cast<GgufType>(number);
  if (type == GgufType::kString) return reader.string("metadata string");
  const std::int64_t at = reader.offset();
  const std::uint64_t bytes = min_bytes(number);
  const std::uint64_t raw = reader.unsigned_le(bytes, "metadata value");
  switch (type) {
    case GgufType::kI8:
    case GgufType::kI16:
    case GgufType::kI32:
    case GgufType::kI64:
      return sign_extend(raw, bytes);
    case GgufType::kF32:
      return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(raw)));
    case GgufType::kF64:
      return std::bit_cast<double>(raw);
    case GgufType::kBool:
      if (raw > 1) reader.bad("bool is " + std::to_string(raw) + ", expected 0 or 1", at);
      return raw == 1;
    default:
      return raw;
  }
}

/// `room` elements are left to all arrays of the file: in memory an element takes more than its
/// byte in the file.
GgufValue read_array(ByteReader& reader, std::uint64_t& room) {
  auto array = std::make_shared<GgufArray>();
  const std::int64_t at = reader.offset();
  array->element_type = reader.u32("array element type");
  check_type(reader, array->element_type, at);
  if (array->element_type == static_cast<std::uint32_t>(GgufType::kArray)) {
    fail(Errc::kUnsupported, "gguf: metadata is an array of arrays, which quantal does not read",
         {.path = reader.path(), .tensor = reader.subject(), .offset = at});
  }
  const std::int64_t count_at = reader.offset();
  const std::uint64_t count = reader.u64("array count");
  const std::uint64_t most = std::min(room, reader.remaining() / min_bytes(array->element_type));
  if (count > most) {
    reader.bad(
        "array count is " + std::to_string(count) + ", expected at most " + std::to_string(most),
        count_at);
  }
  room -= count;
  array->values.reserve(static_cast<std::size_t>(count));
  for (std::uint64_t i = 0; i < count; ++i) {
    array->values.push_back(read_plain(reader, array->element_type));
  }
  return array;
}

/// Elements of all arrays of a file; the largest vocabularies have 10^6 tokens and merges.
constexpr std::uint64_t kMostElements = std::uint64_t{1} << 24;
constexpr std::uint32_t kOldest = 2;
constexpr std::uint32_t kNewest = 3;
constexpr std::uint64_t kMinPairBytes = 8 + 1 + 4 + 1;        // key length, key, type, value
constexpr std::uint64_t kMinTensorBytes = 8 + 0 + 4 + 4 + 8;  // name, n_dims, type, offset

std::uint32_t read_version(ByteReader& reader) {
  const auto magic = reader.take(4, "magic");
  const std::string text(magic.begin(), magic.end());
  if (text != "GGUF") reader.bad("magic is not \"GGUF\"", 0);
  const std::uint32_t version = reader.u32("version");
  if (version >= kOldest && version <= kNewest) return version;
  const std::uint32_t swapped =
      version >> 24 | (version >> 8 & 0xFF00u) | (version << 8 & 0xFF0000u) | version << 24;
  const bool big_endian = swapped >= 1 && swapped <= kNewest;
  fail(Errc::kUnsupported,
       big_endian ? "gguf: file is big-endian, expected little-endian"
                  : "gguf: version is " + std::to_string(version) + ", expected 2 or 3",
       {.path = reader.path(), .offset = 4});
}

/// A count of things that take at least `bytes_each`.
std::uint64_t read_count(ByteReader& reader, const char* what, std::uint64_t bytes_each) {
  const std::int64_t at = reader.offset();
  const std::uint64_t count = reader.u64(what);
  const std::uint64_t most = reader.remaining() / bytes_each;
  if (count > most) {
    reader.bad(std::string(what) + " is " + std::to_string(count) + ", expected at most " +
                   std::to_string(most) + " (file size)",
               at);
  }
  return count;
}

}  // namespace

GgufCounts read_gguf_counts(ByteReader& reader) {
  GgufCounts counts;
  counts.version = read_version(reader);
  counts.tensors = read_count(reader, "tensor count", kMinTensorBytes);
  counts.pairs = read_count(reader, "metadata count", kMinPairBytes);
  return counts;
}

std::vector<GgufPair> read_gguf_metadata(ByteReader& reader, std::uint64_t count) {
  std::vector<GgufPair> out;
  std::set<std::string> keys;
  std::uint64_t room = kMostElements;
  for (std::uint64_t i = 0; i < count; ++i) {
    reader.set_subject({});
    const std::int64_t key_at = reader.offset();
    std::string key = reader.string("metadata key");
    if (key.empty()) reader.bad("metadata key is empty", key_at);
    reader.set_subject(key);
    if (!keys.insert(key).second) reader.bad("metadata key stands twice, expected once", key_at);
    const std::int64_t type_at = reader.offset();
    const std::uint32_t number = reader.u32("metadata type");
    check_type(reader, number, type_at);
    const auto type = static_cast<GgufType>(number);
    out.push_back(
        {std::move(key), type,
         type == GgufType::kArray ? read_array(reader, room) : read_plain(reader, number)});
  }
  reader.set_subject({});
  return out;
}

}  // namespace quantal::io

namespace quantal {

std::vector<GgufPair> parse_gguf_metadata(std::string_view bytes, const std::string& name) {
  io::ByteReader reader({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}, "gguf",
                        name);
  const io::GgufCounts counts = io::read_gguf_counts(reader);
  return io::read_gguf_metadata(reader, counts.pairs);
}

}  // namespace quantal

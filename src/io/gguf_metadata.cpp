#include "io/gguf_metadata.h"

#include <bit>
#include <set>

namespace quantal::io {
namespace {

enum GgufType : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

/// Bytes of a value, for strings and arrays the least they can take; 0 = not a type.
std::uint64_t min_bytes(std::uint32_t type) {
  constexpr std::uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
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
GgufValue read_plain(ByteReader& reader, std::uint32_t type) {
  if (type == kString) return reader.string("metadata string");
  const std::int64_t at = reader.offset();
  const std::uint64_t bytes = min_bytes(type);
  const std::uint64_t raw = reader.unsigned_le(bytes, "metadata value");
  switch (type) {
    case kI8:
    case kI16:
    case kI32:
    case kI64:
      return sign_extend(raw, bytes);
    case kF32:
      return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(raw)));
    case kF64:
      return std::bit_cast<double>(raw);
    case kBool:
      if (raw > 1) reader.bad("bool is " + std::to_string(raw) + ", expected 0 or 1", at);
      return raw == 1;
    default:
      return raw;
  }
}

GgufValue read_array(ByteReader& reader) {
  auto array = std::make_shared<GgufArray>();
  const std::int64_t at = reader.offset();
  array->element_type = reader.u32("array element type");
  check_type(reader, array->element_type, at);
  if (array->element_type == kArray) {
    fail(Errc::kUnsupported, "gguf: metadata is an array of arrays, which quantal does not read",
         {.path = reader.path(), .tensor = reader.subject(), .offset = at});
  }
  const std::int64_t count_at = reader.offset();
  const std::uint64_t count = reader.u64("array count");
  // The limit of ggml's reader, and no more elements than the file can hold.
  constexpr std::uint64_t kMostElements = std::uint64_t{1} << 30;
  const std::uint64_t most =
      std::min(kMostElements, reader.remaining() / min_bytes(array->element_type));
  if (count > most) {
    reader.bad(
        "array count is " + std::to_string(count) + ", expected at most " + std::to_string(most),
        count_at);
  }
  array->values.reserve(static_cast<std::size_t>(count));
  for (std::uint64_t i = 0; i < count; ++i) {
    array->values.push_back(read_plain(reader, array->element_type));
  }
  return array;
}

}  // namespace

std::vector<std::pair<std::string, GgufValue>> read_gguf_metadata(ByteReader& reader,
                                                                  std::uint64_t count) {
  std::vector<std::pair<std::string, GgufValue>> out;
  std::set<std::string> keys;
  for (std::uint64_t i = 0; i < count; ++i) {
    reader.set_subject({});
    const std::int64_t key_at = reader.offset();
    std::string key = reader.string("metadata key");
    if (key.empty()) reader.bad("metadata key is empty", key_at);
    reader.set_subject(key);
    if (!keys.insert(key).second) reader.bad("metadata key stands twice, expected once", key_at);
    const std::int64_t type_at = reader.offset();
    const std::uint32_t type = reader.u32("metadata type");
    check_type(reader, type, type_at);
    out.emplace_back(std::move(key),
                     type == kArray ? read_array(reader) : read_plain(reader, type));
  }
  reader.set_subject({});
  return out;
}

}  // namespace quantal::io

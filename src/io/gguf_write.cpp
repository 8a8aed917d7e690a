// Writing GGUF: header in memory, tensors as they come.
#include <bit>
#include <cmath>
#include <limits>
#include <set>

#include "io/atomic_file.h"
#include "io/gguf_metadata.h"
#include "quantal/io.h"

namespace quantal {
namespace io {
namespace {

constexpr std::uint32_t kVersion = 3;
constexpr std::size_t kMaxNameBytes = 63;
constexpr std::size_t kMaxRank = 4;
constexpr std::int64_t kDefaultAlignment = 32;

void append_le(std::uint64_t value, std::size_t bytes, std::string& out) {
  for (std::size_t i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i) & 0xFF);
}

void append_text(const std::string& text, std::string& out) {
  append_le(text.size(), 8, out);
  out += text;
}

[[noreturn]] void refuse_value(const std::string& key, const std::string& what) {
  fail(Errc::kConfig, "gguf: metadata value " + what, {.path = {}, .tensor = key});
}

std::size_t integer_bytes(GgufType type) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
      return 1;
    case GgufType::kU16:
    case GgufType::kI16:
      return 2;
    case GgufType::kU32:
    case GgufType::kI32:
      return 4;
    default:
      return 8;
  }
}

/// An integer of either signedness, checked against the range of its type.
void append_integer(const std::string& key, GgufType type, const GgufValue& value,
                    std::string& out) {
  GgufRange range;
  gguf_range(type, range);
  if (const auto* plain = std::get_if<std::uint64_t>(&value)) {
    if (*plain > range.high) refuse_value(key, "is " + std::to_string(*plain) + ", too large");
    return append_le(*plain, integer_bytes(type), out);
  }
  const auto* number = std::get_if<std::int64_t>(&value);
  if (number == nullptr) refuse_value(key, "is not an integer, expected one");
  if (*number < range.low || (*number >= 0 && static_cast<std::uint64_t>(*number) > range.high)) {
    refuse_value(key, "is " + std::to_string(*number) + ", outside its type");
  }
  append_le(static_cast<std::uint64_t>(*number), integer_bytes(type), out);
}

void append_plain(const std::string& key, GgufType type, const GgufValue& value, std::string& out) {
  const auto expect = [&key](const auto* pointer, const char* what) {
    if (pointer == nullptr) refuse_value(key, std::string("is of another type, expected ") + what);
  };
  switch (type) {
    case GgufType::kString: {
      const auto* text = std::get_if<std::string>(&value);
      expect(text, "a string");
      return append_text(*text, out);
    }
    case GgufType::kBool: {
      const auto* flag = std::get_if<bool>(&value);
      expect(flag, "a bool");
      return append_le(*flag ? 1 : 0, 1, out);
    }
    case GgufType::kF32: {
      const auto* number = std::get_if<double>(&value);
      expect(number, "a number");
      return append_le(std::bit_cast<std::uint32_t>(static_cast<float>(*number)), 4, out);
    }
    case GgufType::kF64: {
      const auto* number = std::get_if<double>(&value);
      expect(number, "a number");
      return append_le(std::bit_cast<std::uint64_t>(*number), 8, out);
    }
    case GgufType::kArray:
      refuse_value(key, "is an array of arrays, expected an array of plain values");
    default:
      return append_integer(key, type, value, out);
  }
}

/// Magic, version, counts and pairs. Throws for empty and repeated keys.
std::string begin_header(std::span<const GgufPair> metadata, std::size_t tensors) {
  std::string out = "GGUF";
  append_le(kVersion, 4, out);
  append_le(tensors, 8, out);
  append_le(metadata.size(), 8, out);
  std::set<std::string_view> keys;
  for (const GgufPair& pair : metadata) {
    if (pair.key.empty()) fail(Errc::kConfig, "gguf: metadata key is empty, expected a name");
    if (!keys.insert(pair.key).second) {
      fail(Errc::kConfig, "gguf: metadata key is given twice, expected once",
           {.path = {}, .tensor = pair.key});
    }
    append_gguf_pair(pair, out);
  }
  return out;
}

std::int64_t alignment_of(std::span<const GgufPair> metadata) {
  for (const GgufPair& pair : metadata) {
    if (pair.key != "general.alignment") continue;
    const auto* value = std::get_if<std::uint64_t>(&pair.value);
    if (pair.type != GgufType::kU32 || value == nullptr || !std::has_single_bit(*value) ||
        *value > (1u << 30)) {
      refuse_value(pair.key, "is no u32 power of two up to 2^30, expected one");
    }
    return static_cast<std::int64_t>(*value);
  }
  return kDefaultAlignment;
}

std::int64_t aligned(std::int64_t bytes, std::int64_t alignment, const std::string& tensor) {
  const std::int64_t above = checked_add(bytes, alignment - 1, tensor);
  return above / alignment * alignment;
}

void check_plan(const GgufTensorPlan& tensor) {
  const ErrorSite site{.path = {}, .tensor = tensor.name};
  if (tensor.name.empty() || tensor.name.size() > kMaxNameBytes) {
    fail(Errc::kConfig,
         "gguf: tensor name is " + std::to_string(tensor.name.size()) + " bytes, expected 1 to " +
             std::to_string(kMaxNameBytes),
         site);
  }
  if (tensor.shape.empty() || tensor.shape.size() > kMaxRank) {
    fail(Errc::kConfig,
         "gguf: tensor has " + std::to_string(tensor.shape.size()) + " dimensions, expected 1 to " +
             std::to_string(kMaxRank),
         site);
  }
  if (tensor.bytes < 0) {
    fail(Errc::kConfig, "gguf: tensor has " + std::to_string(tensor.bytes) + " bytes", site);
  }
  checked_numel(tensor.shape, tensor.name);
}

}  // namespace

bool gguf_range(GgufType type, GgufRange& range) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kU16:
    case GgufType::kU32:
    case GgufType::kU64:
      range = {0, ~std::uint64_t{0} >> (64 - 8 * integer_bytes(type))};
      return true;
    case GgufType::kI8:
    case GgufType::kI16:
    case GgufType::kI32:
    case GgufType::kI64: {
      const std::uint64_t high = ~std::uint64_t{0} >> (65 - 8 * integer_bytes(type));
      range = {-static_cast<std::int64_t>(high) - 1, high};
      return true;
    }
    default:
      return false;
  }
}

void append_gguf_pair(const GgufPair& pair, std::string& out) {
  append_text(pair.key, out);
  append_le(static_cast<std::uint32_t>(pair.type), 4, out);
  if (pair.type != GgufType::kArray) return append_plain(pair.key, pair.type, pair.value, out);
  const auto* array = std::get_if<std::shared_ptr<GgufArray>>(&pair.value);
  if (array == nullptr || *array == nullptr)
    refuse_value(pair.key, "is not an array, expected one");
  append_le((*array)->element_type, 4, out);
  append_le((*array)->values.size(), 8, out);
  for (const GgufValue& value : (*array)->values) {
    append_plain(pair.key, static_cast<GgufType>((*array)->element_type), value, out);
  }
}

}  // namespace io

struct GgufWriter::State {
  io::AtomicFile file;
  std::vector<GgufTensorPlan> tensors;
  std::int64_t alignment;
  std::size_t current = 0;   // tensor whose turn it is
  std::int64_t written = 0;  // bytes of it

  explicit State(const std::string& path) : file(path), alignment(1) {}

  void pad(std::int64_t bytes) {
    const std::string zeros(
        static_cast<std::size_t>(io::aligned(bytes, alignment, "gguf: padding") - bytes), '\0');
    file.write(zeros);
  }
  /// Ends tensors that are complete.
  void advance() {
    while (current < tensors.size() && written == tensors[current].bytes) {
      pad(written);
      written = 0;
      ++current;
    }
  }
};

GgufWriter::GgufWriter(const std::string& path, std::span<const GgufPair> metadata,
                       std::vector<GgufTensorPlan> tensors) {
  const std::int64_t alignment = io::alignment_of(metadata);
  std::string header = io::begin_header(metadata, tensors.size());
  std::set<std::string_view> names;
  std::int64_t offset = 0;
  for (const GgufTensorPlan& tensor : tensors) {
    io::check_plan(tensor);
    if (!names.insert(tensor.name).second) {
      fail(Errc::kConfig, "gguf: tensor name is given twice, expected once",
           {.path = path, .tensor = tensor.name});
    }
    io::append_text(tensor.name, header);
    io::append_le(tensor.shape.size(), 4, header);
    for (std::size_t d = tensor.shape.size(); d-- > 0;) {
      io::append_le(static_cast<std::uint64_t>(tensor.shape[d]), 8, header);
    }
    io::append_le(tensor.type, 4, header);
    io::append_le(static_cast<std::uint64_t>(offset), 8, header);
    offset = checked_add(offset, io::aligned(tensor.bytes, alignment, tensor.name), tensor.name);
  }
  state_ = std::make_unique<State>(path);
  state_->tensors = std::move(tensors);
  state_->alignment = alignment;
  state_->file.write(header);
  state_->pad(static_cast<std::int64_t>(header.size()));
  state_->advance();
}

GgufWriter::~GgufWriter() = default;

void GgufWriter::write(std::span<const std::uint8_t> bytes) {
  State& s = *state_;
  const auto size = static_cast<std::int64_t>(bytes.size());
  if (size == 0) return;
  const std::int64_t room =
      s.current < s.tensors.size() ? s.tensors[s.current].bytes - s.written : 0;
  if (size > room) {
    fail(Errc::kConfig,
         "gguf: data is " + std::to_string(size) + " bytes, expected at most " +
             std::to_string(room) + ", the rest of the tensor",
         {.path = {},
          .tensor = s.current < s.tensors.size() ? s.tensors[s.current].name : std::string()});
  }
  s.file.write(bytes);
  s.written += size;
  s.advance();
}

void GgufWriter::commit() {
  State& s = *state_;
  if (s.current < s.tensors.size()) {
    fail(Errc::kConfig,
         "gguf: data is " + std::to_string(s.written) + " bytes, expected " +
             std::to_string(s.tensors[s.current].bytes),
         {.path = {}, .tensor = s.tensors[s.current].name});
  }
  s.file.commit();
}

std::string gguf_metadata_bytes(std::span<const GgufPair> metadata) {
  return io::begin_header(metadata, 0);
}

}  // namespace quantal

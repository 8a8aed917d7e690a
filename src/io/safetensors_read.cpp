#include <algorithm>
#include <numeric>

#include "io/safetensors_dtypes.h"
#include "io/safetensors_header.h"
#include "quantal/io.h"

namespace quantal {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // limit of the reference reader

std::string_view header_text(const MappedFile& file) {
  const auto bytes = file.bytes();
  if (bytes.size() < kLengthBytes) {
    fail(Errc::kCorrupt,
         "safetensors: file is " + std::to_string(bytes.size()) + " bytes, expected at least 8",
         {.path = file.path(), .offset = 0});
  }
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    length |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
  }
  const std::uint64_t most = std::min<std::uint64_t>(kMaxHeaderBytes, bytes.size() - kLengthBytes);
  if (length > most) {
    fail(Errc::kCorrupt,
         "safetensors: header length is " + std::to_string(length) + " bytes, expected at most " +
             std::to_string(most) + " (file size " + std::to_string(bytes.size()) + ")",
         {.path = file.path(), .offset = 0});
  }
  return {reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
          static_cast<std::size_t>(length)};
}

DType entry_dtype(const io::SafetensorsEntry& entry, const ErrorSite& site) {
  for (const auto& known : io::kSafetensorsDtypes) {
    if (known.name == entry.dtype) return known.dtype;
  }
  const auto& foreign = io::kSafetensorsForeignDtypes;
  if (std::find(foreign.begin(), foreign.end(), entry.dtype) != foreign.end()) {
    fail(Errc::kUnsupported,
         "safetensors: dtype is " + entry.dtype + ", which quantal does not read", site);
  }
  std::string names;
  for (const auto& known : io::kSafetensorsDtypes) names += " " + std::string(known.name);
  fail(Errc::kCorrupt, "safetensors: dtype is \"" + entry.dtype + "\", expected one of" + names,
       site);
}

/// Bytes that dtype and shape need.
std::int64_t entry_bytes(const io::SafetensorsEntry& entry, DType dtype, const ErrorSite& site) {
  try {
    const std::int64_t numel = checked_numel(entry.shape, "safetensors: shape");
    return checked_mul(numel, static_cast<std::int64_t>(dtype_size(dtype)), "safetensors: bytes");
  } catch (const Error&) {
    fail(Errc::kCorrupt,
         "safetensors: shape " + shape_string(entry.shape) +
             " overflows, expected a size below 2^63",
         site);
  }
}

/// Checks one entry, `expected_begin` being the end of the one before it.
TensorView checked_view(const io::SafetensorsEntry& entry, std::int64_t expected_begin,
                        std::span<const std::uint8_t> data, std::int64_t data_start,
                        const std::string& path) {
  const ErrorSite site{.path = path, .tensor = entry.name, .offset = data_start + expected_begin};
  if (entry.begin != expected_begin) {
    fail(Errc::kCorrupt,
         "safetensors: data begins at " + std::to_string(entry.begin) + ", expected " +
             std::to_string(expected_begin) + " (no hole, no overlap)",
         site);
  }
  if (entry.end < entry.begin || entry.end > static_cast<std::int64_t>(data.size())) {
    fail(Errc::kCorrupt,
         "safetensors: data ends at " + std::to_string(entry.end) + ", expected between " +
             std::to_string(entry.begin) + " and the " + std::to_string(data.size()) +
             " bytes of the data area",
         site);
  }
  const DType dtype = entry_dtype(entry, site);
  const std::int64_t needed = entry_bytes(entry, dtype, site);
  if (needed != entry.end - entry.begin) {
    fail(Errc::kCorrupt,
         "safetensors: data is " + std::to_string(entry.end - entry.begin) + " bytes, expected " +
             std::to_string(needed) + " for " + entry.dtype + " " + shape_string(entry.shape),
         site);
  }
  return {dtype, entry.shape,
          data.subspan(static_cast<std::size_t>(entry.begin), static_cast<std::size_t>(needed))};
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path)
    : file_(std::make_shared<MappedFile>(path)) {
  const std::string_view text = header_text(*file_);
  io::SafetensorsHeader header = io::parse_safetensors_header(text, path);
  metadata_ = std::move(header.metadata);

  std::vector<std::size_t> order(header.entries.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const auto& left = header.entries[a];
    const auto& right = header.entries[b];
    return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
  });

  const std::size_t data_start = kLengthBytes + text.size();
  const auto data = file_->bytes().subspan(data_start);
  std::int64_t end = 0;
  tensors_.reserve(order.size());
  for (const std::size_t i : order) {
    const auto& entry = header.entries[i];
    TensorView view = checked_view(entry, end, data, static_cast<std::int64_t>(data_start), path);
    end = entry.end;
    index_.emplace(entry.name, tensors_.size());
    tensors_.emplace_back(entry.name, std::move(view));
  }
  if (end != static_cast<std::int64_t>(data.size())) {
    fail(Errc::kCorrupt,
         "safetensors: data area is " + std::to_string(data.size()) + " bytes, expected " +
             std::to_string(end) + ", the end of the last tensor",
         {.path = path, .offset = static_cast<std::int64_t>(data_start) + end});
  }
}

const std::string& SafetensorsFile::path() const { return file_->path(); }

const TensorView* SafetensorsFile::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second].second;
}

}  // namespace quantal

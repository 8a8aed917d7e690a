#include <algorithm>
#include <bit>
#include <limits>

#include "io/byte_reader.h"
#include "io/gguf_metadata.h"
#include "quantal/io.h"

namespace quantal {
namespace {

using io::ByteReader;
using BlockSizes = GgufBlockSize (*)(std::uint32_t type);

constexpr std::size_t kMaxNameBytes = 63;  // ggml keeps 64 with the zero
constexpr std::uint32_t kMaxDims = 4;
constexpr std::uint64_t kDefaultAlignment = 32;

std::uint64_t alignment_of(const GgufFile& file) {
  const GgufValue* value = file.find_metadata("general.alignment");
  if (value == nullptr) return kDefaultAlignment;
  const auto* number = std::get_if<std::uint64_t>(value);
  if (number == nullptr || !std::has_single_bit(*number) || *number > (1u << 30)) {
    const std::string actual =
        number == nullptr ? "not an unsigned integer" : std::to_string(*number);
    fail(Errc::kCorrupt, "gguf: alignment is " + actual + ", expected a power of two up to 2^30",
         {.path = file.path(), .tensor = "general.alignment"});
  }
  return *number;
}

/// What the info section says about a tensor.
struct TensorRecord {
  GgufTensor tensor;
  std::uint64_t offset = 0;  ///< in the data section
  std::uint64_t bytes = 0;
  std::int64_t at = 0;  ///< place of its entry in the file
};

/// Bytes of a tensor of `shape`, whose last dimension is the contiguous one.
std::uint64_t tensor_bytes(const ByteReader& reader, const GgufTensor& tensor,
                           const GgufBlockSize& block, std::int64_t at) {
  const std::int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % block.elements != 0) {
    reader.bad("row length is " + std::to_string(row) + ", expected a multiple of " +
                   std::to_string(block.elements) + ", the block of type " +
                   std::to_string(tensor.type),
               at);
  }
  try {
    // numel itself must fit: everybody who uses the shape multiplies it.
    const std::int64_t numel = checked_numel(tensor.shape, "gguf: shape");
    return static_cast<std::uint64_t>(
        checked_mul(numel / block.elements, block.bytes, "gguf: bytes"));
  } catch (const Error&) {
    reader.bad("shape " + shape_string(tensor.shape) + " overflows, expected a size below 2^63",
               at);
  }
}

TensorRecord read_info(ByteReader& reader, BlockSizes block_size) {
  TensorRecord info;
  info.at = reader.offset();
  GgufTensor& tensor = info.tensor;
  tensor.name = reader.string("tensor name");
  if (tensor.name.size() > kMaxNameBytes) {
    reader.bad("tensor name is " + std::to_string(tensor.name.size()) +
                   " bytes, expected at most " + std::to_string(kMaxNameBytes),
               info.at);
  }
  reader.set_subject(tensor.name);
  const std::int64_t dims_at = reader.offset();
  const std::uint32_t dims = reader.u32("number of dimensions");
  if (dims > kMaxDims) {
    reader.bad("number of dimensions is " + std::to_string(dims) + ", expected at most 4", dims_at);
  }
  for (std::uint32_t d = 0; d < dims; ++d) {
    const std::int64_t at = reader.offset();
    const std::uint64_t dim = reader.u64("dimension");
    if (dim > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      reader.bad("dimension is " + std::to_string(dim) + ", expected below 2^63", at);
    }
    tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(dim));
  }
  const std::int64_t type_at = reader.offset();
  tensor.type = reader.u32("tensor type");
  const GgufBlockSize block = block_size(tensor.type);
  if (block.elements <= 0) {
    reader.bad("tensor type is " + std::to_string(tensor.type) + ", which is not a known ggml type",
               type_at);
  }
  info.bytes = tensor_bytes(reader, tensor, block, dims_at);
  info.offset = reader.u64("tensor offset");
  reader.set_subject({});
  return info;
}

/// Gives every tensor its bytes. Tensors stand in the order of their entries, each padded to the
/// alignment; the padding after the last one may be missing.
void place_tensors(std::vector<TensorRecord>& infos, const MappedFile& file,
                   std::int64_t header_end, std::uint64_t alignment) {
  const std::uint64_t size = file.bytes().size();
  const auto aligned = [&](std::uint64_t n) { return (n + alignment - 1) / alignment * alignment; };
  const std::uint64_t data_start = aligned(static_cast<std::uint64_t>(header_end));
  std::uint64_t expected = 0;
  for (TensorRecord& info : infos) {
    const ErrorSite site{.path = file.path(), .tensor = info.tensor.name, .offset = info.at};
    if (info.offset != expected) {
      fail(Errc::kCorrupt,
           "gguf: data offset is " + std::to_string(info.offset) + ", expected " +
               std::to_string(expected) + " (alignment " + std::to_string(alignment) + ")",
           site);
    }
    if (data_start > size || info.offset > size - data_start ||
        info.bytes > size - data_start - info.offset) {
      fail(Errc::kCorrupt,
           "gguf: data is " + std::to_string(info.bytes) + " bytes at offset " +
               std::to_string(info.offset) + " of the data section, which begins at " +
               std::to_string(data_start) + ", expected to end within the " + std::to_string(size) +
               " bytes of the file",
           site);
    }
    info.tensor.file_offset = static_cast<std::int64_t>(data_start + info.offset);
    info.tensor.bytes = file.bytes().subspan(static_cast<std::size_t>(data_start + info.offset),
                                             static_cast<std::size_t>(info.bytes));
    expected = aligned(info.offset + info.bytes);  // below 2 * file size: no overflow
  }
}

}  // namespace

GgufFile::GgufFile(const std::string& path, BlockSizes block_size)
    : file_(std::make_shared<MappedFile>(path)) {
  ByteReader reader(file_->bytes(), "gguf", path);
  const io::GgufCounts counts = io::read_gguf_counts(reader);
  version_ = counts.version;
  for (GgufPair& pair : io::read_gguf_metadata(reader, counts.pairs)) {
    metadata_types_.push_back(pair.type);
    metadata_.emplace_back(std::move(pair.key), std::move(pair.value));
  }

  std::vector<TensorRecord> infos;
  for (std::uint64_t i = 0; i < counts.tensors; ++i) {
    infos.push_back(read_info(reader, block_size));
    const TensorRecord& info = infos.back();
    if (!index_.emplace(info.tensor.name, static_cast<std::size_t>(i)).second) {
      reader.set_subject(info.tensor.name);
      reader.bad("tensor name stands twice, expected once", info.at);
    }
  }
  place_tensors(infos, *file_, reader.offset(), alignment_of(*this));
  tensors_.reserve(infos.size());
  for (TensorRecord& info : infos) tensors_.push_back(std::move(info.tensor));
}

const GgufValue* GgufFile::find_metadata(const std::string& key) const {
  const auto found = std::find_if(metadata_.begin(), metadata_.end(),
                                  [&key](const auto& pair) { return pair.first == key; });
  return found == metadata_.end() ? nullptr : &found->second;
}

std::vector<GgufPair> GgufFile::pairs() const {
  std::vector<GgufPair> out;
  for (std::size_t i = 0; i < metadata_.size(); ++i) {
    out.push_back({metadata_[i].first, metadata_types_[i], metadata_[i].second});
  }
  return out;
}

const GgufTensor* GgufFile::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace quantal

#include <algorithm>
#include <charconv>

#include "io/pickle.h"
#include "io/strided.h"
#include "io/zip.h"
#include "quantal/archive.h"

namespace quantal {
namespace {

constexpr std::uint64_t kStorageAlignment = 64;  // torch's own
constexpr std::string_view kFolder = "archive/";

std::string member_name(std::string_view name) { return std::string(kFolder) + std::string(name); }

}  // namespace

struct TorchWriter::State {
  explicit State(const std::string& path) : zip(path) {}

  /// Size of a tensor's storage, after checking that the tensor is one of ours.
  std::int64_t storage_bytes(const TorchTensor& tensor) const {
    std::size_t index = storages.size();
    const char* end = tensor.storage.data() + tensor.storage.size();
    const auto parsed = std::from_chars(tensor.storage.data(), end, index);
    if (parsed.ec != std::errc() || parsed.ptr != end || index >= storages.size()) {
      fail(Errc::kConfig,
           "torch: tensor has storage \"" + tensor.storage +
               "\", expected one that this writer wrote",
           {.path = zip.path()});
    }
    const std::int64_t bytes = storages[index];
    const io::StridedExtent extent = io::strided_extent(tensor, bytes);
    if (!extent.fault.empty()) {
      fail(Errc::kConfig, "torch: tensor " + extent.fault, {.path = zip.path()});
    }
    return bytes;
  }

  io::ZipWriter zip;
  std::vector<std::int64_t> storages;  ///< bytes, by key
};

TorchWriter::TorchWriter(const std::string& path) : state_(std::make_unique<State>(path)) {}
TorchWriter::~TorchWriter() = default;
TorchWriter::TorchWriter(TorchWriter&&) noexcept = default;
TorchWriter& TorchWriter::operator=(TorchWriter&&) noexcept = default;

TorchTensor TorchWriter::add(const TensorView& tensor) {
  const std::int64_t bytes = checked_mul(
      tensor.numel(), static_cast<std::int64_t>(dtype_size(tensor.dtype)), "torch: bytes");
  const std::string key = std::to_string(state_->storages.size());
  check_size("torch: tensor bytes", tensor.bytes.size(), static_cast<std::size_t>(bytes),
             {.path = state_->zip.path()});
  state_->zip.add(member_name("data/" + key), {}, tensor.bytes, kStorageAlignment);
  state_->storages.push_back(bytes);
  TorchTensor out{.dtype = tensor.dtype,
                  .shape = tensor.shape,
                  .strides = std::vector<std::int64_t>(tensor.shape.size()),
                  .offset = 0,
                  .storage = key};
  std::int64_t stride = 1;
  for (std::size_t d = tensor.shape.size(); d-- > 0;) {
    out.strides[d] = stride;
    stride = checked_mul(stride, std::max<std::int64_t>(tensor.shape[d], 1), "torch: stride");
  }
  return out;
}

void TorchWriter::finish(const TorchValue& root) {
  const std::string pickle = io::write_torch_pickle(
      root, [this](const TorchTensor& tensor) { return state_->storage_bytes(tensor); });
  state_->zip.add(member_name("data.pkl"), pickle);
  state_->zip.add(member_name("byteorder"), "little");
  state_->zip.add(member_name("version"), "3\n");
  state_->zip.finish();
}

}  // namespace quantal

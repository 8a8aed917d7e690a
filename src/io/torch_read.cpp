// Torch zip files: which members there are, and tensors over their storages.
#include <algorithm>
#include <bit>

#include "io/npy.h"
#include "io/pickle.h"
#include "io/strided.h"
#include "io/zip.h"
#include "quantal/archive.h"

namespace quantal {
namespace {

constexpr std::string_view kPickle = "/data.pkl";

/// A file that is no torch zip is refused by what it is.
void refuse_by_name(const std::string& path) {
  const FileKind kind = detect_file(path);
  if (kind == FileKind::kTorch || kind == FileKind::kUnknown) return;
  std::string_view remedy;
  if (kind == FileKind::kTorchLegacy || kind == FileKind::kTar) {
    remedy = "; load it with an older torch and save it again";
  } else if (kind == FileKind::kTorchScript) {
    remedy = "; save its state_dict() with torch.save";
  }
  fail(Errc::kUnsupported,
       "torch: file is " + std::string(file_kind_name(kind)) +
           ", expected a zip file of torch.save (torch 1.6 or newer)" + std::string(remedy),
       {.path = path});
}

/// "archive" of the one member "archive/data.pkl".
std::string find_folder(const io::ZipArchive& zip) {
  std::string folder;
  for (const io::ZipMember& member : zip.members()) {
    if (!member.name.ends_with(kPickle) ||
        member.name.find('/') != member.name.size() - kPickle.size()) {
      continue;
    }
    if (!folder.empty()) {
      fail(Errc::kCorrupt, "torch: zip has two data.pkl, expected one",
           {.path = zip.file()->path(), .tensor = member.name});
    }
    folder = member.name.substr(0, member.name.size() - kPickle.size());
  }
  if (folder.empty()) {
    fail(Errc::kCorrupt, "torch: zip has no <folder>/data.pkl", {.path = zip.file()->path()});
  }
  return folder;
}

bool without_crc(const io::ZipArchive& zip) {
  return std::all_of(zip.members().begin(), zip.members().end(),
                     [](const io::ZipMember& member) { return member.crc == 0; });
}

}  // namespace

struct TorchFile::State {
  explicit State(const std::string& path)
      : zip(std::make_shared<MappedFile>(path)),
        folder(find_folder(zip)),
        checked(!without_crc(zip)),
        swapped(read_swapped()) {
    const io::ZipMember& pickle = stored(folder + std::string(kPickle));
    if (checked) zip.verify(pickle);
    root = io::read_torch_pickle(
        {.bytes = zip.packed(pickle),
         .path = path,
         .offset = static_cast<std::int64_t>(pickle.data_offset),
         .check_tensor = [this](const TorchTensor& tensor, std::int64_t storage_bytes) {
           check_tensor(tensor, storage_bytes);
         }});
  }

  const std::string& path() const { return zip.file()->path(); }

  const io::ZipMember& stored(const std::string& name) const {
    const io::ZipMember* member = zip.find(name);
    if (member == nullptr) {
      fail(Errc::kCorrupt, "torch: zip has no member " + name, {.path = path()});
    }
    if (member->deflated) {
      fail(Errc::kUnsupported, "torch: member is compressed, expected it stored as torch does",
           {.path = path(), .tensor = name});
    }
    return *member;
  }

  const io::ZipMember& storage(const TorchTensor& tensor) const {
    return stored(folder + "/data/" + tensor.storage);
  }

  bool read_swapped() const {
    const io::ZipMember* member = zip.find(folder + "/byteorder");
    if (member == nullptr) return false;  // torch before 2.0 did not say; little it was
    const auto bytes = zip.packed(stored(member->name));
    const std::string text(
        bytes.begin(),
        bytes.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(bytes.size(), 16)));
    if (text != "little" && text != "big") {
      fail(Errc::kCorrupt, "torch: byteorder is neither \"little\" nor \"big\"",
           {.path = path(), .offset = static_cast<std::int64_t>(member->data_offset)});
    }
    return text == "big";
  }

  void check_tensor(const TorchTensor& tensor, std::int64_t storage_bytes) {
    const io::ZipMember& member = storage(tensor);
    const ErrorSite site{.path = path(),
                         .tensor = member.name,
                         .offset = static_cast<std::int64_t>(member.data_offset)};
    if (static_cast<std::uint64_t>(storage_bytes) > member.bytes) {
      fail(Errc::kCorrupt,
           "torch: storage is " + std::to_string(member.bytes) + " bytes, expected at least " +
               std::to_string(storage_bytes),
           site);
    }
    const io::StridedExtent extent = io::strided_extent(tensor, storage_bytes);
    if (!extent.fault.empty()) fail(Errc::kCorrupt, "torch: tensor " + extent.fault, site);
    if (extent.contiguous) return;
    // Views that overlap (stride 0, windows) can be larger than the file by any factor.
    const std::uint64_t bytes = static_cast<std::uint64_t>(extent.numel) * dtype_size(tensor.dtype);
    const std::uint64_t most =
        4 * static_cast<std::uint64_t>(zip.file()->bytes().size()) + (16u << 20);
    if (bytes > most || copied > most - bytes) {
      fail(Errc::kUnsupported,
           "torch: views of storages add up to more than four times the file, expected at most " +
               std::to_string(most) + " bytes",
           site);
    }
    copied += bytes;
  }

  HeldTensor read(const TorchTensor& tensor) const {
    const io::ZipMember& member = storage(tensor);
    const io::StridedExtent extent =
        io::strided_extent(tensor, static_cast<std::int64_t>(member.bytes));
    if (!extent.fault.empty()) {
      fail(Errc::kCorrupt, "torch: tensor " + extent.fault,
           {.path = path(), .tensor = member.name});
    }
    if (checked) zip.verify(member);
    const std::size_t itemsize = dtype_size(tensor.dtype);
    const auto bytes = static_cast<std::size_t>(extent.numel) * itemsize;
    if (bytes == 0) return {{tensor.dtype, tensor.shape, {}}, zip.file()};
    const auto storage_bytes = zip.packed(member);
    const auto begin = static_cast<std::size_t>(tensor.offset) * itemsize;
    const std::uint8_t* address = storage_bytes.data() + begin;
    const bool aligned = reinterpret_cast<std::uintptr_t>(address) % itemsize == 0;
    if (extent.contiguous && !swapped && aligned) {
      return {{tensor.dtype, tensor.shape, storage_bytes.subspan(begin, bytes)}, zip.file()};
    }
    auto held = std::make_shared<std::vector<std::uint8_t>>(bytes);
    io::copy_strided(tensor, storage_bytes.data(), held->data());
    if (swapped) io::swap_elements(*held, itemsize);
    return {{tensor.dtype, tensor.shape, *held}, held};
  }

  io::ZipArchive zip;
  std::string folder;
  bool checked;  ///< CRC-32 sums are there
  bool swapped;  ///< storages are big-endian
  std::uint64_t copied = 0;
  TorchValue root;
};

TorchFile::TorchFile(const std::string& path) {
  refuse_by_name(path);
  state_ = std::make_shared<const State>(path);
}

const TorchValue& TorchFile::root() const { return state_->root; }

HeldTensor TorchFile::read(const TorchTensor& tensor) const { return state_->read(tensor); }

const std::string& TorchFile::path() const { return state_->path(); }

}  // namespace quantal

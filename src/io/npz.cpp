#include "io/npy.h"
#include "io/zip.h"
#include "quantal/archive.h"

namespace quantal {
namespace {

constexpr std::string_view kSuffix = ".npy";

bool aligned(const void* address, std::size_t to) {
  return reinterpret_cast<std::uintptr_t>(address) % to == 0;
}

}  // namespace

struct NpzFile::State {
  explicit State(const std::string& path) : zip(std::make_shared<MappedFile>(path)) {
    for (const io::ZipMember& member : zip.members()) {
      if (member.name.back() != '/') add(member);
    }
  }

  void add(const io::ZipMember& member) {
    std::string name = member.name;
    if (name.ends_with(kSuffix)) name.resize(name.size() - kSuffix.size());
    const ErrorSite site{.path = zip.file()->path(),
                         .tensor = name,
                         .offset = static_cast<std::int64_t>(member.data_offset)};
    if (!index.emplace(name, infos.size()).second) {
      fail(Errc::kCorrupt, "npz: array name stands twice, expected once", site);
    }
    const auto head = zip.unpack_head(member, io::kMostNpyHeader);
    layouts.push_back(io::read_npy_layout(head, member.bytes, site));
    infos.push_back({std::move(name), layouts.back().dtype, layouts.back().shape});
    members.push_back(&member);
  }

  io::ZipArchive zip;
  std::vector<TensorInfo> infos;
  std::vector<io::NpyLayout> layouts;
  std::vector<const io::ZipMember*> members;
  std::map<std::string, std::size_t> index;
};

NpzFile::NpzFile(const std::string& path) : state_(std::make_shared<State>(path)) {}

const std::vector<TensorInfo>& NpzFile::tensors() const { return state_->infos; }

const TensorInfo* NpzFile::find(const std::string& name) const {
  const auto found = state_->index.find(name);
  return found == state_->index.end() ? nullptr : &state_->infos[found->second];
}

const std::string& NpzFile::path() const { return state_->zip.file()->path(); }

const std::string& NpzFile::comment() const { return state_->zip.comment(); }

HeldTensor NpzFile::read(const std::string& name) const {
  const auto found = state_->index.find(name);
  if (found == state_->index.end()) {
    fail(Errc::kConfig, "npz: array is not in the file", {.path = path(), .tensor = name});
  }
  const io::ZipMember& member = *state_->members[found->second];
  const io::NpyLayout& layout = state_->layouts[found->second];
  const bool plain = !layout.swapped && (!layout.fortran_order || layout.shape.size() < 2);
  if (!member.deflated && plain) {
    const auto data = state_->zip.packed(member).subspan(layout.data_begin, layout.data_bytes);
    if (aligned(data.data(), dtype_size(layout.dtype))) {
      state_->zip.verify(member);
      return {{layout.dtype, layout.shape, data}, state_->zip.file()};
    }
  }
  auto held = std::make_shared<std::vector<std::uint8_t>>(state_->zip.unpack(member));
  held->erase(held->begin(), held->begin() + static_cast<std::ptrdiff_t>(layout.data_begin));
  io::normalize_npy(layout, *held);
  return {{layout.dtype, layout.shape, *held}, held};
}

struct NpzWriter::State {
  explicit State(const std::string& path) : zip(path) {}
  io::ZipWriter zip;
};

NpzWriter::NpzWriter(const std::string& path) : state_(std::make_unique<State>(path)) {}
NpzWriter::~NpzWriter() = default;
NpzWriter::NpzWriter(NpzWriter&&) noexcept = default;
NpzWriter& NpzWriter::operator=(NpzWriter&&) noexcept = default;

void NpzWriter::put(const std::string& name, const TensorView& tensor) {
  const std::string head = io::npy_head(tensor, {.path = state_->zip.path(), .tensor = name});
  // Arrays begin at 64 bytes, so that a mapping of the file can be used in place.
  state_->zip.add(name + std::string(kSuffix),
                  {reinterpret_cast<const std::uint8_t*>(head.data()), head.size()}, tensor.bytes,
                  64);
}

void NpzWriter::finish(std::string_view comment) { state_->zip.finish(comment); }

}  // namespace quantal

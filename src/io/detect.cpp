// What a file is, by its content.
#include <algorithm>
#include <array>

#include "io/zip.h"
#include "quantal/io.h"

namespace quantal {
namespace {

// A pickle of protocol 2 that holds the number 0x1950a86a20f9469cfc6c.
constexpr std::string_view kLegacyTorch("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
                                        15);
constexpr std::size_t kTarMark = 257;
constexpr std::uint64_t kMostSafetensorsHeader = 100'000'000;

bool is_safetensors(std::span<const std::uint8_t> bytes) {
  if (bytes.size() < 10) return false;
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0;) length = length << 8 | bytes[i];
  if (length < 2 || length > std::min<std::uint64_t>(kMostSafetensorsHeader, bytes.size() - 8)) {
    return false;
  }
  const auto header = bytes.subspan(8, static_cast<std::size_t>(length));
  const auto first =
      std::find_if(header.begin(), header.end(), [](std::uint8_t c) { return c != ' '; });
  return first != header.end() && *first == '{';
}

FileKind kind_of_zip(std::shared_ptr<MappedFile> file) {
  try {
    const io::ZipArchive zip(std::move(file));
    bool arrays = true;
    for (const io::ZipMember& member : zip.members()) {
      const std::size_t slash = member.name.find('/');
      arrays = arrays && member.name.ends_with(".npy");
      if (slash == std::string::npos || member.name.substr(slash) != "/data.pkl") continue;
      const std::string folder = member.name.substr(0, slash);
      const bool code = std::any_of(
          zip.members().begin(), zip.members().end(),
          [&](const io::ZipMember& other) { return other.name.starts_with(folder + "/code/"); });
      return code && zip.find(folder + "/constants.pkl") != nullptr ? FileKind::kTorchScript
                                                                    : FileKind::kTorch;
    }
    return arrays ? FileKind::kNpz : FileKind::kUnknown;
  } catch (const Error&) {
    return FileKind::kUnknown;
  }
}

}  // namespace

std::string_view file_kind_name(FileKind kind) noexcept {
  switch (kind) {
    case FileKind::kSafetensors:
      return "a safetensors file";
    case FileKind::kGguf:
      return "a GGUF file";
    case FileKind::kNpy:
      return "an npy file";
    case FileKind::kNpz:
      return "an npz file";
    case FileKind::kTorch:
      return "a torch zip file";
    case FileKind::kTorchScript:
      return "a TorchScript archive";
    case FileKind::kTorchLegacy:
      return "a legacy torch file (before torch 1.6, not a zip)";
    case FileKind::kTar:
      return "a tar archive";
    case FileKind::kUnknown:
      break;
  }
  return "a file of unknown kind";
}

FileKind detect_file(const std::string& path) {
  auto file = std::make_shared<MappedFile>(path);
  const auto bytes = file->bytes();
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.starts_with("GGUF")) return FileKind::kGguf;
  if (text.starts_with("\x93NUMPY")) return FileKind::kNpy;
  if (text.starts_with("PK\x03\x04") || text.starts_with("PK\x05\x06")) {
    return kind_of_zip(std::move(file));
  }
  if (text.starts_with(kLegacyTorch)) return FileKind::kTorchLegacy;
  if (text.size() > kTarMark + 5 && text.substr(kTarMark, 5) == "ustar") return FileKind::kTar;
  return is_safetensors(bytes) ? FileKind::kSafetensors : FileKind::kUnknown;
}

}  // namespace quantal

#include "checkpoint/locate.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <string_view>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

/// In the order in which transformers and the packages themselves look.
constexpr std::array<std::string_view, 8> kNames = {
    "model.safetensors", "pytorch_model.bin", "qmodel.pt",     "hqq_model.pt",
    "model.pth",         "weights.npz",       "mlx_model.npz", "quanto_model.pth"};

/// Settings files of layouts that look for their weights in another order.
struct Hint {
  std::string_view settings;
  std::array<std::string_view, 5> names;
};
constexpr std::array<Hint, 3> kHints = {{
    {"hqq_config.json", {"hqq_model.pt", "pytorch_model.bin", "model.safetensors", {}, {}}},
    {"mlx_config.json",
     {"model.safetensors", "mlx_model.npz", "weights.npz", "pytorch_model.bin", "model.pth"}},
    {"quantization_config.json", {"pytorch_model.bin", "model.safetensors", "model.pth", {}, {}}},
}};

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

std::optional<Container> container_of(FileKind kind) {
  switch (kind) {
    case FileKind::kSafetensors:
      return Container::kSafetensors;
    case FileKind::kTorch:
      return Container::kTorch;
    case FileKind::kNpz:
      return Container::kNpz;
    case FileKind::kGguf:
      return Container::kGguf;
    default:
      return std::nullopt;
  }
}

/// The reader of the suffix says best what is wrong with a file that is nothing known.
Container container_by_content(const std::string& path) {
  const FileKind kind = detect_file(path);
  if (const auto known = container_of(kind)) return *known;
  if (path.ends_with(".npz")) return Container::kNpz;
  if (path.ends_with(".gguf")) return Container::kGguf;
  const bool torch_kind =
      kind == FileKind::kTorchScript || kind == FileKind::kTorchLegacy || kind == FileKind::kTar;
  for (const char* suffix : {".pt", ".pth", ".bin"}) {
    if (torch_kind || path.ends_with(suffix)) return Container::kTorch;
  }
  if (kind == FileKind::kNpy) {
    fail(Errc::kUnsupported, "checkpoint: file is one npy array, expected a file of named tensors",
         {.path = path});
  }
  return Container::kSafetensors;
}

struct Found {
  std::string name;  ///< of the unsharded file
  bool sharded = false;
};

std::optional<Found> look_for(const std::string& folder, std::string_view name) {
  const std::string file(name);
  if (exists(folder + "/" + file)) return Found{file, false};
  if (exists(folder + "/" + file + ".index.json")) return Found{file, true};
  return std::nullopt;
}

/// Quanto's layout without a map keeps its settings in config.json.
bool bin_first(const std::string& folder) {
  const std::string path = folder + "/config.json";
  if (!exists(path)) return false;
  const Json config = parse_json_object(read_text_file(path), path);
  const auto found = config.find("quantization_config");
  return found != config.end() && found->is_object() && found->contains("bits") &&
         found->value("quant_method", Json()) == "quanto";
}

std::vector<Found> candidates(const std::string& folder) {
  std::vector<Found> all;
  const auto add = [&](std::string_view name) {
    if (name.empty()) return;
    const bool seen =
        std::any_of(all.begin(), all.end(), [&](const Found& one) { return one.name == name; });
    if (seen) return;
    if (auto found = look_for(folder, name)) all.push_back(std::move(*found));
  };
  for (const Hint& hint : kHints) {
    if (!exists(folder + "/" + std::string(hint.settings))) continue;
    for (const std::string_view name : hint.names) add(name);
  }
  if (all.empty() && bin_first(folder)) add("pytorch_model.bin");
  for (const std::string_view name : kNames) add(name);
  return all;
}

/// Files whose names nobody promised: shards without an index, one GGUF.
std::vector<std::string> other_files(const std::string& folder, std::string_view prefix,
                                     std::string_view suffix) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(prefix) && name.ends_with(suffix)) names.push_back(folder + "/" + name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

[[noreturn]] void fail_nothing_found(const std::string& folder) {
  std::string looked;
  for (const std::string_view name : kNames) {
    looked += (looked.empty() ? "" : ", ") + std::string(name);
    if (name == kNames[0] || name == kNames[1]) looked += ", " + std::string(name) + ".index.json";
  }
  std::string also;
  for (const char* adapter : {"adapter_model.safetensors", "adapter_model.bin"}) {
    if (exists(folder + "/" + adapter)) {
      also = std::string("; found ") + adapter + ", a PEFT adapter: load its base model";
    }
  }
  fail(Errc::kIo,
       "No checkpoint found in " + folder + ": looked for " + looked +
           ", model*.safetensors and one .gguf" + also,
       {.path = folder});
}

Located locate_folder(const std::string& folder) {
  Located out;
  out.path = folder;
  out.folder = true;
  const std::vector<Found> found = candidates(folder);
  if (found.empty()) {
    out.files = other_files(folder, "model", ".safetensors");
    out.weights = "model.safetensors";
    if (!out.files.empty()) return out;
    out.files = other_files(folder, "", ".gguf");
    if (out.files.size() != 1) fail_nothing_found(folder);
    out.weights = fs::path(out.files.front()).filename().string();
    out.container = container_by_content(out.files.front());
    return out;
  }
  out.weights = found.front().name;
  for (std::size_t i = 1; i < found.size(); ++i) {
    out.notes.push_back("read " + out.weights + ", passed over " + found[i].name);
  }
  const std::string path = folder + "/" + out.weights;
  if (found.front().sharded) {
    out.index = path + ".index.json";
    out.container =
        out.weights.ends_with(".safetensors") ? Container::kSafetensors : Container::kTorch;
  } else {
    out.files = {path};
    out.container = container_by_content(path);
  }
  return out;
}

}  // namespace

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\\') == std::string::npos && name.find('\0') == std::string::npos;
}

bool is_weights_name(const std::string& name) {
  if (name.starts_with("adapter_model.")) return false;
  for (const char* suffix : {".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json",
                             ".pt", ".pth", ".npz", ".gguf"}) {
    if (name.ends_with(suffix)) return true;
  }
  return name == kMarker;
}

Located locate(const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return locate_folder(path);
  Located out;
  out.path = path;
  out.files = {path};
  out.container = container_by_content(path);
  return out;
}

}  // namespace quantal::checkpoint

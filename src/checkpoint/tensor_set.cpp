#include "checkpoint/tensor_set.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <set>

#include "checkpoint/folder.h"
#include "checkpoint/json.h"
#include "quantal/archive.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

/// Largest JSON file that is kept as a text beside the weights.
constexpr std::uintmax_t kMostTextBytes = 4u << 20;

/// JSON files of tokenizers and indexes: no settings in them, and some are large.
bool is_settings_name(const std::string& name) {
  if (!name.ends_with(".json") || name.ends_with(".index.json") || name == kMarker) return false;
  constexpr std::array<std::string_view, 6> kOthers = {
      "tokenizer.json",          "tokenizer_config.json", "vocab.json",
      "special_tokens_map.json", "added_tokens.json",     "preprocessor_config.json"};
  for (const std::string_view other : kOthers) {
    if (name == other) return false;
  }
  return true;
}

void add_texts(TensorSet& set, const std::string& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    std::error_code ignored;
    if (!is_settings_name(name) || !entry.is_regular_file(ignored)) continue;
    if (entry.file_size(ignored) > kMostTextBytes) continue;
    set.texts[name] = read_text_file(entry.path().string());
  }
  const auto config = set.texts.find("config.json");
  // Refused here, with its path.
  if (config != set.texts.end()) parse_json_object(config->second, folder + "/config.json");
}

/// A view whose address fits its element type; files do not promise that.
HeldTensor aligned(const TensorView& view, const std::shared_ptr<void>& owner) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.bytes.data());
  if (address % dtype_size(view.dtype) == 0) return {view, owner};
  const auto copy =
      std::make_shared<std::vector<std::uint8_t>>(view.bytes.begin(), view.bytes.end());
  return {{view.dtype, view.shape, *copy}, copy};
}

void add_file(TensorSet& set, const std::string& path) {
  switch (set.where.container) {
    case Container::kSafetensors:
      return add_safetensors(set, path);
    case Container::kTorch:
      return add_torch(set, path);
    case Container::kNpz:
      return add_npz(set, path);
    case Container::kGguf:
      break;
  }
  fail(Errc::kInternal, "checkpoint: a GGUF file has a reader of its own", {.path = path});
}

/// Tensors of an index by file, every name checked.
std::map<std::string, std::vector<std::string>> read_index(const std::string& path) {
  const auto index =
      quantal::parse_json_object<nlohmann::json>(read_text_file(path), path, JsonKeys::kUnique);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    fail(Errc::kCorrupt,
         "index: weight_map is missing or empty, expected an object of tensor to file",
         {.path = path});
  }
  std::map<std::string, std::vector<std::string>> files;
  for (const auto& [tensor, file] : map->items()) {
    const ErrorSite site{.path = path, .tensor = tensor};
    if (!file.is_string()) {
      fail(Errc::kCorrupt,
           std::string("index: file is a ") + file.type_name() + ", expected a string", site);
    }
    const std::string name = file.get<std::string>();
    if (!is_plain_name(name)) {
      fail(Errc::kCorrupt, "index: file is \"" + name + "\", expected a plain file name", site);
    }
    files[name].push_back(tensor);
  }
  return files;
}

void add_shards(TensorSet& set) {
  const std::string& index = set.where.index;
  std::string missing;
  for (const auto& [name, tensors] : read_index(index)) {
    const std::string path = set.where.path + "/" + name;
    TensorSet shard;
    shard.where.container = set.where.container;
    add_file(shard, path);
    set.where.files.push_back(path);
    set.notes.insert(set.notes.end(), shard.notes.begin(), shard.notes.end());
    for (const std::string& tensor : tensors) {
      const auto found = shard.tensors.find(tensor);
      if (found == shard.tensors.end()) {
        if (shard.second_names.count(tensor) != 0) continue;
        missing += (missing.empty() ? "" : ", ") + tensor + " in " + name;
      } else {
        set.tensors.insert(shard.tensors.extract(found));
      }
    }
  }
  if (!missing.empty()) {
    fail(Errc::kCorrupt, "index: tensors are missing from their files: " + missing,
         {.path = index});
  }
}

std::string describe(const Located& where) {
  constexpr std::array<const char*, 4> kNames = {"safetensors", "torch", "npz", "GGUF"};
  const std::size_t count = where.files.size();
  return std::string(kNames[static_cast<std::size_t>(where.container)]) + ", " +
         std::to_string(count) + (count == 1 ? " file" : " files");
}

/// What save_checkpoint put into a single file, which has no files beside it.
void unpack_metadata(TensorSet& set) {
  const auto found = set.metadata.find(kEmbeddedTexts);
  if (found == set.metadata.end()) return;
  const Json texts = parse_json_object(found->second, set.path());
  for (const auto& [name, text] : texts.items()) {
    if (!text.is_string()) continue;
    set.texts[name] = text.get<std::string>();
    parse_json_object(set.texts[name], set.path());
  }
}

}  // namespace

std::int64_t StoredTensor::bytes() const {
  return checked_mul(checked_numel(shape, "tensor"), static_cast<std::int64_t>(dtype_size(dtype)),
                     "tensor bytes");
}

const std::string& TensorSet::config_json() const {
  static const std::string kNone = "{}";
  const auto found = texts.find("config.json");
  return found == texts.end() ? kNone : found->second;
}

void add_safetensors(TensorSet& set, const std::string& path) {
  const auto file = std::make_shared<SafetensorsFile>(path);
  for (const auto& [name, view] : file->tensors()) {
    const bool added =
        set.tensors
            .emplace(name, StoredTensor{view.dtype, view.shape, StateKind::kTensor,
                                        [file, v = &view] { return aligned(*v, file); }})
            .second;
    if (!added) {
      fail(Errc::kCorrupt, "checkpoint: tensor stands in two files of the folder",
           {.path = path, .tensor = name});
    }
  }
  set.metadata = file->metadata();
}

void add_npz(TensorSet& set, const std::string& path) {
  const auto file = std::make_shared<NpzFile>(path);
  for (const TensorInfo& info : file->tensors()) {
    set.tensors.emplace(info.name, StoredTensor{info.dtype, info.shape, StateKind::kTensor,
                                                [file, name = info.name] {
                                                  HeldTensor held = file->read(name);
                                                  if (held.owner == nullptr) held.owner = file;
                                                  return held;
                                                }});
  }
  // Any other comment is somebody else's.
  const std::string begin = std::string("{\"") + kEmbeddedTexts + "\":";
  if (!file->comment().starts_with(begin)) return;
  const Json object = parse_json_object(file->comment(), path);
  if (object.at(kEmbeddedTexts).is_object()) {
    set.metadata[kEmbeddedTexts] = dump_json(object.at(kEmbeddedTexts), -1);
  }
}

TensorSet open_tensor_set(const Located& where) {
  TensorSet set;
  set.where = where;
  set.notes = where.notes;
  if (!where.index.empty()) {
    add_shards(set);
  } else {
    for (const std::string& file : where.files) add_file(set, file);
  }
  if (where.folder) {
    add_texts(set, where.path);
  } else {
    unpack_metadata(set);
  }
  set.description = describe(set.where);
  return set;
}

TensorSet open_tensor_set(const std::string& path) { return open_tensor_set(locate(path)); }

}  // namespace quantal::checkpoint

#include "checkpoint/tensor_set.h"

#include <filesystem>

#include "checkpoint/json.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

void add_file(TensorSet& set, const std::string& path) {
  auto file = std::make_shared<SafetensorsFile>(path);
  for (const auto& [name, view] : file->tensors()) set.tensors.emplace(name, view);
  set.files.push_back(std::move(file));
}

/// A shard is named by a plain file name: an index must not lead out of its folder.
void check_plain_name(const std::string& name, const std::string& tensor, const std::string& path) {
  if (!name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
      name.find('\\') == std::string::npos && name.find('\0') == std::string::npos) {
    return;
  }
  fail(Errc::kCorrupt, "index: file is \"" + name + "\", expected a plain file name",
       {.path = path, .tensor = tensor});
}

void add_shards(TensorSet& set, const std::string& folder) {
  const std::string path = folder + "/" + kIndex;
  const Json index = parse_json_object(read_text_file(path), path);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object()) {
    fail(Errc::kCorrupt, "index: weight_map is missing, expected an object of tensor to file",
         {.path = path});
  }
  std::map<std::string, std::shared_ptr<SafetensorsFile>> shards;
  std::string missing;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) {
      fail(Errc::kCorrupt,
           std::string("index: file is a ") + file.type_name() + ", expected a string",
           {.path = path, .tensor = tensor});
    }
    const std::string name = file.get<std::string>();
    check_plain_name(name, tensor, path);
    auto& shard = shards[name];
    if (shard == nullptr) {
      shard = std::make_shared<SafetensorsFile>(folder + "/" + name);
      set.files.push_back(shard);
    }
    const TensorView* view = shard->find(tensor);
    if (view == nullptr) {
      missing += (missing.empty() ? "" : ", ") + tensor + " in " + name;
      continue;
    }
    set.tensors.emplace(tensor, *view);
  }
  if (!missing.empty()) {
    fail(Errc::kCorrupt, "index: tensors are missing from their files: " + missing, {.path = path});
  }
}

[[noreturn]] void fail_nothing_found(const std::string& folder) {
  std::string also;
  for (const char* name : {"pytorch_model.bin", "qmodel.pt", "hqq_model.pt", "model.pth",
                           "weights.npz", "mlx_model.npz"}) {
    if (exists(folder + "/" + name)) also += std::string(also.empty() ? "" : ", ") + name;
  }
  if (!also.empty()) also = "; found " + also + ", which quantal does not read";
  fail(Errc::kIo,
       "No checkpoint found in " + folder + ": looked for " + kSingle + " and " + kIndex + also,
       {.path = folder});
}

}  // namespace

TensorSet open_tensor_set(const std::string& path) {
  TensorSet set;
  set.path = path;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    add_file(set, path);
    return set;
  }
  if (exists(path + "/" + kSingle)) {
    add_file(set, path + "/" + kSingle);
  } else if (exists(path + "/" + kIndex)) {
    add_shards(set, path);
  } else {
    fail_nothing_found(path);
  }
  const std::string config = path + "/config.json";
  if (exists(config)) {
    set.config_json = read_text_file(config);
    parse_json_object(set.config_json, config);  // refused here, with its path
  }
  return set;
}

}  // namespace quantal::checkpoint

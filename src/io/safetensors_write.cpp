#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>

#include "io/atomic_file.h"
#include "io/safetensors_dtypes.h"
#include "quantal/io.h"

namespace quantal {
namespace {

using NamedView = std::pair<std::string, TensorView>;
using Metadata = std::map<std::string, std::string>;

const io::SafetensorsDtype& dtype_entry(const TensorInfo& tensor) {
  for (const auto& known : io::kSafetensorsDtypes) {
    if (known.dtype == tensor.dtype) return known;
  }
  fail(Errc::kInternal, "safetensors: dtype has no name", {.tensor = tensor.name});
}

/// A JSON string literal. Throws Error{kConfig} for text that is not UTF-8.
std::string quoted(const std::string& text, const std::string& path) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail(Errc::kConfig, "safetensors: a name or metadata string is not valid UTF-8",
         {.path = path});
  }
}

std::vector<std::size_t> writing_order(std::span<const TensorInfo> tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const int left = dtype_entry(tensors[a]).rank;
    const int right = dtype_entry(tensors[b]).rank;
    return left != right ? left > right : tensors[a].name < tensors[b].name;
  });
  return order;
}

std::int64_t bytes_of(const TensorInfo& tensor) {
  return checked_mul(checked_numel(tensor.shape, "safetensors: shape"),
                     static_cast<std::int64_t>(dtype_size(tensor.dtype)), "safetensors: bytes");
}

void check_names(std::span<const TensorInfo> tensors, const std::string& path) {
  std::set<std::string_view> names;
  for (const TensorInfo& tensor : tensors) {
    const ErrorSite site{.path = path, .tensor = tensor.name};
    if (tensor.name == "__metadata__") {
      fail(Errc::kConfig, "safetensors: tensor name is __metadata__, which is reserved", site);
    }
    if (!names.insert(tensor.name).second) {
      fail(Errc::kConfig, "safetensors: tensor name is given twice, expected once", site);
    }
  }
}

std::string header_json(std::span<const TensorInfo> tensors, std::span<const std::size_t> order,
                        const Metadata& metadata, const std::string& path) {
  std::string text = "{";
  const auto separate = [&text] {
    if (text.size() > 1) text += ',';
  };
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (auto it = metadata.begin(); it != metadata.end(); ++it) {
      if (it != metadata.begin()) text += ',';
      text += quoted(it->first, path) + ":" + quoted(it->second, path);
    }
    text += '}';
  }
  std::int64_t offset = 0;
  for (const std::size_t i : order) {
    const TensorInfo& tensor = tensors[i];
    separate();
    text += quoted(tensor.name, path) + ":{\"dtype\":\"" + std::string(dtype_entry(tensor).name) +
            "\",\"shape\":[";
    for (std::size_t d = 0; d < tensor.shape.size(); ++d) {
      text += (d == 0 ? "" : ",") + std::to_string(tensor.shape[d]);
    }
    text += "],\"data_offsets\":[" + std::to_string(offset) + ",";
    offset = checked_add(offset, bytes_of(tensor), "safetensors: bytes of the file");
    text += std::to_string(offset) + "]}";
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

/// Names of tensors that did not arrive, the first few of them.
std::string some_names(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 5;
  std::string out;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i) {
    out += (i == 0 ? "" : ", ") + names[i];
  }
  if (names.size() > kShown) out += ", ... (" + std::to_string(names.size()) + " in all)";
  return out;
}

[[noreturn]] void fail_missing(const std::vector<std::string>& names, const std::string& path) {
  fail(Errc::kConfig, "safetensors: tensors never arrived: " + some_names(names), {.path = path});
}

TensorInfo info_of(const NamedView& tensor) {
  return {tensor.first, tensor.second.dtype, tensor.second.shape};
}

}  // namespace

// ------------------------------------------------------------------ one file

struct SafetensorsWriter::State {
  struct Place {
    TensorInfo info;
    std::uint64_t offset = 0;
    std::int64_t bytes = 0;
    bool arrived = false;
  };

  State(const std::string& path_, std::vector<TensorInfo> tensors, const Metadata& metadata)
      : path(path_) {
    check_names(tensors, path);
    const std::vector<std::size_t> order = writing_order(tensors);
    const std::string header = header_json(tensors, order, metadata, path);
    std::uint8_t length[8];
    for (std::size_t i = 0; i < 8; ++i) {
      length[i] = static_cast<std::uint8_t>(static_cast<std::uint64_t>(header.size()) >> (8 * i));
    }
    file = std::make_unique<io::AtomicFile>(path);
    file->write(length);
    file->write(header);
    std::uint64_t offset = file->size();
    for (const std::size_t i : order) {
      const std::int64_t bytes = bytes_of(tensors[i]);
      std::string name = tensors[i].name;
      places.emplace(std::move(name), Place{std::move(tensors[i]), offset, bytes});
      offset += static_cast<std::uint64_t>(bytes);
    }
    missing = places.size();
  }

  std::string path;
  std::unique_ptr<io::AtomicFile> file;
  std::map<std::string, Place> places;
  std::size_t missing = 0;
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                                     const Metadata& metadata)
    : state_(std::make_unique<State>(path, std::move(tensors), metadata)) {}
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter& SafetensorsWriter::operator=(SafetensorsWriter&&) noexcept = default;

void SafetensorsWriter::put(const std::string& name, const TensorView& tensor) {
  const ErrorSite site{.path = state_->path, .tensor = name};
  const auto found = state_->places.find(name);
  if (found == state_->places.end()) {
    fail(Errc::kConfig, "safetensors: tensor was not announced", site);
  }
  State::Place& place = found->second;
  if (place.arrived) fail(Errc::kConfig, "safetensors: tensor arrives twice, expected once", site);
  if (tensor.dtype != place.info.dtype) {
    fail(Errc::kDtype,
         "safetensors: dtype is " + std::string(dtype_name(tensor.dtype)) + ", expected " +
             std::string(dtype_name(place.info.dtype)) + " as announced",
         site);
  }
  if (tensor.shape != place.info.shape) {
    fail(Errc::kShape,
         "safetensors: shape is " + shape_string(tensor.shape) + ", expected " +
             shape_string(place.info.shape) + " as announced",
         site);
  }
  check_size("safetensors: tensor bytes", tensor.bytes.size(),
             static_cast<std::size_t>(place.bytes), site);
  state_->file->write_at(place.offset, tensor.bytes);
  place.arrived = true;
  if (--state_->missing == 0) state_->file->seal();
}

void SafetensorsWriter::finish() {
  std::vector<std::string> missing;
  for (const auto& [name, place] : state_->places) {
    if (!place.arrived) missing.push_back(name);
  }
  if (!missing.empty()) fail_missing(missing, state_->path);
  state_->file->commit();
}

void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const Metadata& metadata) {
  std::vector<TensorInfo> infos;
  for (const NamedView& tensor : tensors) {
    infos.push_back(info_of(tensor));
    check_size("safetensors: tensor bytes", tensor.second.bytes.size(),
               static_cast<std::size_t>(bytes_of(infos.back())),
               {.path = path, .tensor = tensor.first});
  }
  SafetensorsWriter writer(path, infos, metadata);
  for (const NamedView& tensor : tensors) writer.put(tensor.first, tensor.second);
  writer.finish();
}

// ------------------------------------------------------------------ many files

struct ShardedSafetensorsWriter::State {
  struct Shard {
    std::vector<TensorInfo> tensors;
    std::optional<SafetensorsWriter> writer;  ///< from its first tensor on
  };

  State(const std::string& folder_, std::vector<TensorInfo> tensors, const ShardOptions& options_)
      : folder(folder_), options(options_) {
    const std::string& stem = options.stem;
    if (stem.empty() || stem == "." || stem == ".." || stem.find('/') != std::string::npos) {
      fail(Errc::kConfig, "safetensors: stem is \"" + stem + "\", expected a plain file name");
    }
    if (options.max_shard_bytes < 0) {
      fail(Errc::kConfig, "safetensors: max_shard_bytes is " +
                              std::to_string(options.max_shard_bytes) + ", expected >= 0");
    }
    check_names(tensors, folder);
    cut(std::move(tensors));
    name_files();
  }

  void cut(std::vector<TensorInfo> tensors) {
    shards.emplace_back();
    std::int64_t filled = 0;
    for (TensorInfo& tensor : tensors) {
      const std::int64_t bytes = bytes_of(tensor);
      total = checked_add(total, bytes, "safetensors: bytes of the model");
      if (options.max_shard_bytes > 0 && bytes > options.max_shard_bytes - filled &&
          !shards.back().tensors.empty()) {
        shards.emplace_back();
        filled = 0;
      }
      filled += bytes;
      shard_of.emplace(tensor.name, shards.size() - 1);
      shards.back().tensors.push_back(std::move(tensor));
    }
  }

  void name_files() {
    if (shards.size() == 1) {
      files = {options.stem + ".safetensors"};
      return;
    }
    const auto padded = [](std::size_t number) {
      std::string digits = std::to_string(number);
      return digits.size() < 5 ? std::string(5 - digits.size(), '0') + digits : digits;
    };
    for (std::size_t i = 0; i < shards.size(); ++i) {
      files.push_back(options.stem + "-" + padded(i + 1) + "-of-" + padded(shards.size()) +
                      ".safetensors");
    }
    files.push_back(options.stem + ".safetensors.index.json");
  }

  SafetensorsWriter& writer(std::size_t index) {
    Shard& shard = shards[index];
    if (!shard.writer) {
      shard.writer.emplace(folder + "/" + files[index], std::move(shard.tensors), options.metadata);
    }
    return *shard.writer;
  }

  void write_index() const {
    nlohmann::json index;
    index["metadata"]["total_size"] = total;
    for (const auto& [name, shard] : shard_of) index["weight_map"][name] = files[shard];
    const std::string text = index.dump(2) + "\n";
    write_file_atomic(folder + "/" + files.back(),
                      {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }

  std::string folder;
  ShardOptions options;
  std::vector<Shard> shards;
  std::vector<std::string> files;
  std::map<std::string, std::size_t> shard_of;
  std::set<std::string> arrived;
  std::int64_t total = 0;
};

ShardedSafetensorsWriter::ShardedSafetensorsWriter(const std::string& folder,
                                                   std::vector<TensorInfo> tensors,
                                                   const ShardOptions& options)
    : state_(std::make_unique<State>(folder, std::move(tensors), options)) {}
ShardedSafetensorsWriter::~ShardedSafetensorsWriter() = default;

const std::vector<std::string>& ShardedSafetensorsWriter::files() const { return state_->files; }

void ShardedSafetensorsWriter::put(const std::string& name, const TensorView& tensor) {
  const auto found = state_->shard_of.find(name);
  if (found == state_->shard_of.end()) {
    fail(Errc::kConfig, "safetensors: tensor was not announced",
         {.path = state_->folder, .tensor = name});
  }
  state_->writer(found->second).put(name, tensor);
  state_->arrived.insert(name);
}

void ShardedSafetensorsWriter::finish() {
  std::vector<std::string> missing;
  for (const auto& [name, shard] : state_->shard_of) {
    if (state_->arrived.count(name) == 0) missing.push_back(name);
  }
  if (!missing.empty()) fail_missing(missing, state_->folder);
  for (std::size_t i = 0; i < state_->shards.size(); ++i) state_->writer(i).finish();
  if (state_->shards.size() > 1) state_->write_index();
}

}  // namespace quantal

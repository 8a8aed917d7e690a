#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>

#include "checkpoint/companions.h"
#include "checkpoint/folder.h"
#include "checkpoint/gguf.h"
#include "checkpoint/json.h"
#include "checkpoint/layer_index.h"
#include "checkpoint/locate.h"
#include "checkpoint/reader.h"

namespace quantal {
namespace {

using checkpoint::Json;
using checkpoint::ModelReader;

void refuse_unread(const ModelReader& reader, const std::string& path) {
  if (!reader.unread().empty()) fail(Errc::kUnsupported, reader.unread(), {.path = path});
}

/// One fault is reported as it is, several in one list.
void raise(const std::vector<std::pair<std::string, Error>>& faults, const std::string& path) {
  if (faults.empty()) return;
  if (faults.size() == 1) throw faults.front().second;
  constexpr std::size_t kShown = 8;
  std::string text;
  for (std::size_t i = 0; i < std::min(kShown, faults.size()); ++i) {
    text +=
        (i == 0 ? "" : "; ") + faults[i].first + ": " + checkpoint::message_of(faults[i].second);
  }
  if (faults.size() > kShown) text += "; ...";
  fail(faults.front().second.code(),
       "checkpoint: " + std::to_string(faults.size()) + " layers cannot be read: " + text,
       {.path = path, .tensor = faults.front().second.site().tensor});
}

/// Imports every layer, in parallel where the executor allows it.
void read_layers(const ModelReader& reader, const Executor& executor, const std::string& path,
                 Checkpoint& out) {
  const std::vector<std::string>& names = reader.layer_names();
  std::vector<PackedMatrix*> slots;
  slots.reserve(names.size());
  for (const std::string& name : names) slots.push_back(&out.layers[name]);
  std::vector<std::optional<Error>> errors(names.size());
  executor.parallel_for(0, std::ssize(names), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      try {
        *slots[at] = reader.read_layer(names[at]);
      } catch (const Error& e) {
        errors[at] = e;
      }
    }
  });
  std::vector<std::pair<std::string, Error>> faults;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (errors[i]) faults.emplace_back(names[i], *errors[i]);
  }
  raise(faults, path);
}

void verify_digest(const Checkpoint& checkpoint, const std::string& folder) {
  const std::string path = folder + "/" + checkpoint::kMarker;
  std::error_code ignored;
  if (folder.empty() || !std::filesystem::exists(path, ignored)) return;
  const Json marker = checkpoint::parse_json_object(read_text_file(path), path);
  const auto stored = marker.find("digest");
  if (stored == marker.end() || !stored->is_string()) return;
  CheckpointView view;
  for (const auto& [name, layer] : checkpoint.layers) view.layers.emplace_back(name, layer.view());
  for (const auto& [name, tensor] : checkpoint.tensors) view.tensors.emplace_back(name, tensor);
  const std::string actual = checkpoint_digest(view);
  if (actual == stored->get<std::string>()) return;
  fail(Errc::kCorrupt,
       "checkpoint: digest of the content is " + actual + ", expected " +
           stored->get<std::string>() + ": the files were changed after saving",
       {.path = path});
}

}  // namespace

namespace checkpoint {

void ModelReader::read_rows(const std::string& name, std::int64_t begin, std::int64_t end,
                            std::span<std::uint8_t> out) const {
  const HeldTensor held = lend_tensor(name);
  const TensorView& view = held.view;
  const std::int64_t rows = view.shape.empty() ? 1 : view.shape.front();
  const ErrorSite site{.tensor = name};
  if (begin < 0 || begin > end || end > rows) {
    fail(Errc::kShape,
         "read_rows: range is [" + std::to_string(begin) + ", " + std::to_string(end) +
             "), expected within [0, " + std::to_string(rows) + ")",
         site);
  }
  const std::size_t row_bytes = rows == 0 ? 0 : view.bytes.size() / static_cast<std::size_t>(rows);
  const std::size_t wanted = row_bytes * static_cast<std::size_t>(end - begin);
  check_size("read_rows: bytes of the target", out.size(), wanted, site);
  if (wanted == 0) return;
  std::memcpy(out.data(), view.bytes.data() + row_bytes * static_cast<std::size_t>(begin), wanted);
}

std::unique_ptr<ModelReader> open_model(const std::string& path, const LoadOptions& options) {
  const Located where = locate(path);
  return where.container == Container::kGguf ? open_gguf_reader(where.files.front(), options)
                                             : open_file_reader(where, options);
}

}  // namespace checkpoint

std::unique_ptr<CheckpointReader> CheckpointReader::open(const std::string& path,
                                                         const LoadOptions& options) {
  auto reader = checkpoint::open_model(path, options);
  refuse_unread(*reader, path);
  return reader;
}

Checkpoint load_checkpoint(const std::string& path, const LoadOptions& options) {
  const std::shared_ptr<ModelReader> reader = checkpoint::open_model(path, options);
  refuse_unread(*reader, path);
  Checkpoint out;
  out.config_json = reader->config_json();
  out.texts = reader->texts();
  if (!reader->folder().empty()) checkpoint::add_tokenizer_texts(reader->folder(), out.texts);
  out.notes = reader->notes();
  read_layers(*reader, options.executor != nullptr ? *options.executor : serial_executor(), path,
              out);
  out.layout = reader->layout();
  out.owners.push_back(reader);  // its mappings
  for (const std::string& name : reader->tensor_names()) {
    HeldTensor held = reader->lend_tensor(name);
    if (held.owner != nullptr) out.owners.push_back(held.owner);
    out.tensors.emplace(name, std::move(held.view));
  }
  if (options.verify_digest) verify_digest(out, reader->folder());
  return out;
}

}  // namespace quantal

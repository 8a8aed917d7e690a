// Sinks of safetensors and npz; that of torch files is in torch_sink.cpp.
#include "checkpoint/sink.h"

#include <algorithm>

#include "checkpoint/folder.h"
#include "checkpoint/spool.h"
#include "checkpoint/torch_sink.h"
#include "quantal/archive.h"

namespace quantal::checkpoint {
namespace {

/// "model" of "model.safetensors".
std::string stem_of(std::string_view weights) {
  return std::string(weights.substr(0, weights.rfind('.')));
}

class SafetensorsSink final : public TensorSink {
 public:
  SafetensorsSink(const FileLayout& layout, SinkTarget target)
      : layout_(layout),
        target_(std::move(target)),
        spool_(target_.folder.empty() ? target_.file : target_.folder + "/weights") {}

  void put(const Piece& piece) override {
    if (piece.kind == StateKind::kNone) return;
    Waiting one{piece.name(), {}, 0};
    if (piece.lasting) {
      one.view = piece.view;
    } else {
      one.spooled = spool_.add(piece.view) + 1;
    }
    waiting_.push_back(std::move(one));
  }

  void finish(const SinkEnd& end) override {
    spool_.seal();
    std::vector<std::pair<std::string, TensorView>> tensors;
    for (const Waiting& one : waiting_) {
      tensors.emplace_back(one.name, one.spooled == 0 ? one.view : spool_.view(one.spooled - 1));
    }
    std::map<std::string, std::string> metadata = end.side.metadata;
    if (metadata.empty()) metadata["format"] = "pt";
    if (target_.folder.empty()) {
      if (!end.texts_json.empty()) metadata[kEmbeddedTexts] = end.texts_json;
      write_safetensors(target_.file, tensors, metadata);
      return;
    }
    write_folder(tensors, metadata);
  }

 private:
  struct Waiting {
    std::string name;
    TensorView view;
    std::size_t spooled;  ///< number in the spool + 1; 0: `view`
  };

  void write_folder(std::vector<std::pair<std::string, TensorView>>& tensors,
                    const std::map<std::string, std::string>& metadata) {
    std::sort(tensors.begin(), tensors.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<TensorInfo> infos;
    std::int64_t total = 0;
    for (const auto& [name, view] : tensors) {
      infos.push_back({name, view.dtype, view.shape});
      total += std::ssize(view.bytes);
    }
    ShardedSafetensorsWriter writer(target_.folder, std::move(infos),
                                    {.stem = stem_of(layout_.weights),
                                     .max_shard_bytes = target_.max_shard_bytes,
                                     .metadata = metadata});
    for (const auto& [name, view] : tensors) writer.put(name, view);
    writer.finish();
    if (!layout_.always_index || writer.files().size() > 1) return;
    std::map<std::string, std::string> map;
    for (const auto& [name, view] : tensors) map[name] = writer.files().front();
    const std::string text = index_text(total, map);
    write_file_atomic(target_.folder + "/" + std::string(layout_.weights) + ".index.json",
                      {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }

  FileLayout layout_;
  SinkTarget target_;
  Spool spool_;
  std::vector<Waiting> waiting_;
};

class NpzSink final : public TensorSink {
 public:
  NpzSink(const std::string& path, bool single) : path_(path), single_(single), writer_(path) {}
  void put(const Piece& piece) override {
    if (piece.kind != StateKind::kNone) writer_.put(piece.name(), piece.view);
  }
  void finish(const SinkEnd& end) override {
    std::string comment;
    if (single_ && !end.texts_json.empty()) {
      comment = std::string("{\"") + kEmbeddedTexts + "\":" + end.texts_json + "}";
      if (comment.size() > NpzWriter::kMostComment) {
        fail(Errc::kUnsupported,
             "save: settings are " + std::to_string(comment.size()) +
                 " bytes, expected at most 65535 in a single npz file; a folder holds any number",
             {.path = path_});
      }
    }
    writer_.finish(comment);
  }

 private:
  std::string path_;
  bool single_;
  NpzWriter writer_;
};

}  // namespace

std::string index_text(std::int64_t total_size,
                       const std::map<std::string, std::string>& weight_map) {
  nlohmann::json index;
  index["metadata"]["total_size"] = total_size;
  index["weight_map"] = weight_map;
  return dump_json(index) + "\n";
}

std::unique_ptr<TensorSink> open_sink(const FileLayout& layout, const SinkTarget& target) {
  const std::string path =
      target.folder.empty() ? target.file : target.folder + "/" + std::string(layout.weights);
  const bool shards = !target.folder.empty() && layout.tree == StateTree::kFlat &&
                      layout.container != Container::kNpz;
  if (target.max_shard_bytes > 0 && !shards) {
    fail(Errc::kConfig,
         "save: max_shard_bytes is " + std::to_string(target.max_shard_bytes) +
             ", expected 0: the layout " + std::string(layout.name) + " is one file",
         {.path = path});
  }
  switch (layout.container) {
    case Container::kSafetensors:
      return std::make_unique<SafetensorsSink>(layout, target);
    case Container::kTorch:
      return open_torch_sink(layout, target);
    case Container::kNpz:
      return std::make_unique<NpzSink>(path, target.folder.empty());
    case Container::kGguf:
      break;
  }
  fail(Errc::kInternal, "checkpoint: GGUF files have a writer of their own", {.path = path});
}

}  // namespace quantal::checkpoint

// A model on its way to disk, layer by layer.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/folder.h"
#include "checkpoint/gguf.h"
#include "checkpoint/sink.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

/// Writes one model in one layout; `commit` makes it visible, a destructor without it leaves
/// nothing. Not thread-safe.
class ModelWriter {
 public:
  /// `dialect` null: a dense model. Throws Error{kConfig} for a layout that does not exist and for
  /// a target that must not be replaced, Error{kIo}.
  ModelWriter(const std::string& path, const Dialect* dialect, const SaveOptions& options);
  ~ModelWriter();

  const FileLayout& layout() const { return layout_; }
  bool single_file() const { return layout_.weights.empty(); }

  /// Throws Error{kConfig} for a layer of another dialect and for a name that was there.
  void add_layer(const std::string& name, const PackedView& layer);
  /// The same for a matrix that is not needed afterwards.
  void add_layer(const std::string& name, PackedMatrix&& layer) { add_layer(name, layer.view()); }
  /// `lasting`: the bytes stay until commit, no copy is kept on disk meanwhile.
  void add_tensor(const std::string& name, const TensorView& tensor, bool lasting);
  /// Copies a file into a folder target.
  void add_companion(const std::string& from, const std::string& name);
  /// `dense` and `texts` as in CheckpointView. Throws Error{kCorrupt} if `config_json` is not an
  /// object.
  void commit(const std::string& config_json, std::vector<std::string> dense,
              const SideTexts& texts);

 private:
  void add_name(const std::string& name);
  bool has_head() const;
  void name_tied_head(const std::string& config_json);
  void write_texts(const SideFiles& side, const std::string& config, const SideTexts& texts);

  std::string path_;
  const Dialect* dialect_;
  FileLayout layout_;
  std::optional<AtomicFolder> folder_;
  std::unique_ptr<TensorSink> sink_;       ///< null for GGUF
  std::unique_ptr<GgufModelWriter> gguf_;  ///< null for all others
  ModelDigest digest_;
  std::vector<LayerEntry> layers_;
  std::vector<std::string> linears_;  ///< modules of dense 2-D weights
  std::set<std::string> names_, companions_;
};

/// True for modules that look up rows instead of multiplying: embed_tokens, wte ...
bool is_embedding(const std::string& module);
/// "a.b" of "a.b.weight"; empty if the name has no such end.
std::string module_of_weight(const std::string& tensor);

}  // namespace quantal::checkpoint

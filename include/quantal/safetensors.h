// quantal safetensors: reading a mapped file, writing whole, one tensor at a time, or in shards.
// docs/formats/safetensors.md.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "quantal/core.h"

namespace quantal {

class MappedFile;

/// A tensor before its bytes are there.
struct TensorInfo {
  std::string name;                 ///< in the header
  DType dtype = DType::kF32;        ///< of the elements
  std::vector<std::int64_t> shape;  ///< sizes, slowest dimension first
};

/// A safetensors file, mapped. Tensors are views into the mapping (zero copy).
class SafetensorsFile {
 public:
  /// Throws Error{kIo}, Error{kCorrupt} (with tensor and offset) as docs/formats/safetensors.md
  /// lists.
  explicit SafetensorsFile(const std::string& path);
  /// In file order of their data.
  const std::vector<std::pair<std::string, TensorView>>& tensors() const { return tensors_; }
  const TensorView* find(const std::string& name) const;  ///< nullptr if absent
  /// Member "__metadata__" of the header.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const;  ///< of the file that was opened

 private:
  std::shared_ptr<MappedFile> file_;
  std::vector<std::pair<std::string, TensorView>> tensors_;
  std::map<std::string, std::size_t> index_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a safetensors file atomically, tensor by tensor (no second copy of the data in memory).
/// Tensors are ordered by descending dtype size, then name; the header is padded to 8 bytes, as the
/// reference writer does. Throws Error{kIo}; Error{kConfig} for duplicate or reserved names.
void write_safetensors(const std::string& path,
                       std::span<const std::pair<std::string, TensorView>> tensors,
                       const std::map<std::string, std::string>& metadata = {});

/// Writes a safetensors file whose tensors arrive one at a time, in any order: the header is
/// written first from what is known of them, each tensor goes to its place at once and is not kept.
/// Same bytes as write_safetensors. Not thread-safe.
class SafetensorsWriter {
 public:
  /// Throws as write_safetensors. Nothing is visible at `path` before finish().
  SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                    const std::map<std::string, std::string>& metadata = {});
  ~SafetensorsWriter();  ///< without finish(): `path` stays as it was
  /// Takes the file over; `other` can only be destroyed then.
  SafetensorsWriter(SafetensorsWriter&&) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) noexcept;  ///< as above

  /// Throws Error{kConfig} for an unknown name or a second time, Error{kDtype}, Error{kShape} where
  /// the tensor is not what was announced.
  void put(const std::string& name, const TensorView& tensor);
  /// Throws Error{kConfig} listing tensors that never arrived.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// How a model is cut into files.
struct ShardOptions {
  std::string stem = "model";        ///< model.safetensors, model-00001-of-00002.safetensors ...
  std::int64_t max_shard_bytes = 0;  ///< tensor bytes per file; 0 = one file
  std::map<std::string, std::string> metadata{};  ///< of every file
};

/// SafetensorsWriter over one or many files of a folder. Tensors fill the shards in the order of
/// `tensors`; one that is larger than the limit has a file of its own. One file has no index, more
/// have `<stem>.safetensors.index.json` {"metadata": {"total_size"}, "weight_map"}.
class ShardedSafetensorsWriter {
 public:
  /// Throws as SafetensorsWriter; Error{kConfig} for a negative limit or a stem that is no plain
  /// name.
  ShardedSafetensorsWriter(const std::string& folder, std::vector<TensorInfo> tensors,
                           const ShardOptions& options = {});
  ~ShardedSafetensorsWriter();
  /// File names in order, the index (where there is one) last.
  const std::vector<std::string>& files() const;
  void put(const std::string& name, const TensorView& tensor);  ///< as SafetensorsWriter::put
  /// Puts all files in place, the index last. Throws as SafetensorsWriter::finish.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quantal

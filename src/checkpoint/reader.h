// A CheckpointReader with what the room itself needs beside the public part.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/locate.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

class ModelReader : public CheckpointReader {
 public:
  /// Without a copy where the file allows it; the owner keeps a mapping or a buffer alive.
  virtual HeldTensor lend_tensor(const std::string& name) const = 0;
  void read_rows(const std::string& name, std::int64_t begin, std::int64_t end,
                 std::span<std::uint8_t> out) const final;
  /// Bytes of the layer in the file.
  virtual std::int64_t layer_bytes(const std::string& name) const = 0;
  /// Folder of the model; empty for a single file.
  virtual const std::string& folder() const = 0;
  /// "safetensors, 2 files", "GGUF version 3".
  virtual const std::string& container() const = 0;
  /// Metadata of the container, for inspection.
  virtual std::vector<std::pair<std::string, std::string>> metadata() const { return {}; }
  virtual const std::vector<std::string>& notes() const = 0;
  /// Why tensors that look packed are in no layer; empty if all is well.
  virtual const std::string& unread() const = 0;
};

/// Opens any kind. Where packed tensors belong to no known dialect it opens nevertheless and says
/// so in unread().
std::unique_ptr<ModelReader> open_model(const std::string& path, const LoadOptions& options);

std::unique_ptr<ModelReader> open_file_reader(const Located& where, const LoadOptions& options);

}  // namespace quantal::checkpoint

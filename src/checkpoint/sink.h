// Weights on their way into a container, one tensor at a time.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "checkpoint/json.h"
#include "quantal/checkpoint.h"

namespace quantal::checkpoint {

/// A tensor or a small value of a module. Its full name is `<module>.<field>`.
struct Piece {
  std::string module, field;
  TensorView view;
  StateKind kind = StateKind::kTensor;
  bool codes = false;    ///< first tensor of a quantized layer: stands outside its meta dictionary
  bool layer = false;    ///< belongs to a quantized layer
  bool lasting = false;  ///< `view` stays valid until finish()

  std::string name() const { return module.empty() ? field : module + "." + field; }
};

/// What is known only when every layer has been seen.
struct SinkEnd {
  SideFiles side;
  std::string texts_json;  ///< for containers that keep them: JSON object of file name to text
};

class TensorSink {
 public:
  virtual ~TensorSink() = default;
  virtual void put(const Piece& piece) = 0;
  /// A second name for the tensor `of` of layouts with names_tied_head; others have none.
  virtual void put_alias(const Piece& /*name*/, const std::string& /*of*/) {}
  virtual void finish(const SinkEnd& end) = 0;
};

/// Where the sink writes: into `folder` under names that follow from layout.weights, or one file.
struct SinkTarget {
  std::string folder;  ///< empty: a single file
  std::string file;    ///< path of the single file
  std::int64_t max_shard_bytes = 0;
};

/// For every container but GGUF. Throws Error{kIo}.
std::unique_ptr<TensorSink> open_sink(const FileLayout& layout, const SinkTarget& target);

/// {"metadata": {"total_size": ...}, "weight_map": ...} as indented text.
std::string index_text(std::int64_t total_size,
                       const std::map<std::string, std::string>& weight_map);

}  // namespace quantal::checkpoint

// quantal checkpoint: load and save whole models without torch. Joins containers (io), dialects
// (formats) and policy; the torch layer and the cli stand on it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"
#include "quantal/io.h"
#include "quantal/kernels.h"

namespace quantal {

/// A model on disk whose tensors are seen under Hugging Face names: a GGUF file, a single
/// safetensors file, or a folder with config.json and safetensors (sharded or not). Quantized GGUF
/// tensors are decoded on reading; rotary rows of q and k are put into Hugging Face order.
class ModelSource {
 public:
  /// Throws Error{kIo}, Error{kCorrupt}, Error{kUnsupported}.
  static std::unique_ptr<ModelSource> open(const std::string& path);
  virtual ~ModelSource() = default;

  /// Hugging Face config.json of the model (from GGUF metadata: architecture, sizes, rope, eps,
  /// tie_word_embeddings, token ids). "{}" if unknown.
  virtual std::string config_json() const = 0;
  /// Tokenizer facts of a GGUF as JSON {model, pre, tokens, token_type, merges, bos ...
  /// chat_template};
  /// "{}" where the source has none.
  virtual std::string tokenizer_json() const = 0;

  struct Info {
    std::string name;
    std::vector<std::int64_t> shape;
    std::string stored_type;  ///< "Q4_1", "bf16" ...
    std::int64_t stored_bytes = 0;
  };
  virtual const std::vector<Info>& tensors() const = 0;
  /// Decodes rows [row_begin, row_end) of a tensor (1-D: one row of all elements) into `out`, as
  /// f32, f16 or bf16. Throws Error{kShape}, Error{kUnsupported}.
  virtual void read_rows(const std::string& name, std::int64_t row_begin, std::int64_t row_end,
                         DType dtype, void* out, const Executor& executor) const = 0;
};

/// A quantized model in memory: packed layers by module path, everything else dense.
struct Checkpoint {
  std::string config_json = "{}";  ///< including quantization_config
  std::map<std::string, PackedMatrix> layers;
  std::map<std::string, TensorView> tensors;  ///< by full tensor name; borrowed from `files`
  std::vector<std::shared_ptr<void>> owners;  ///< keeps mappings alive
};

/// Reads a folder (config.json + safetensors, sharded or single) or one safetensors file written by
/// quantal or by the upstream package. Throws Error{kCorrupt} listing missing and extra tensors of
/// a layer; "No checkpoint found in {path}" (Error{kIo}) names what was looked for.
Checkpoint load_checkpoint(const std::string& path);

/// What save_checkpoint writes.
struct CheckpointView {
  std::string config_json = "{}";  ///< model config; quantization_config is added to it
  std::vector<std::pair<std::string, PackedView>> layers;
  std::vector<std::pair<std::string, TensorView>> tensors;
  std::string quantization_config_json;  ///< from the dialect; empty for a dense model
};
/// Writes `folder`/config.json and model.safetensors in the dialect's upstream layout. The folder
/// appears whole or not at all; an existing folder that quantal did not write is refused unless
/// `overwrite`. Throws Error{kIo}, Error{kConfig}.
void save_checkpoint(const std::string& folder, const CheckpointView& view, bool overwrite = false);

/// SHA-256 (hex) over names, specs and bytes of all layers and tensors, in name order; equal
/// digests mean equal models.
std::string checkpoint_digest(const CheckpointView& view);

/// Human-readable description of a file or folder (the cli's `inspect`), as text or JSON.
std::string inspect_text(const std::string& path, bool all_tensors);
std::string inspect_json(const std::string& path);

}  // namespace quantal

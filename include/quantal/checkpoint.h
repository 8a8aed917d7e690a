// quantal checkpoint: load, save and convert whole models without torch. Joins containers (io),
// dialects (formats) and policy; the torch layer and the cli stand on it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "quantal/core.h"
#include "quantal/formats.h"
#include "quantal/io.h"
#include "quantal/kernels.h"
#include "quantal/transcode.h"

namespace quantal {

/// A model on disk whose tensors are seen under Hugging Face names: a GGUF file, a single file or a
/// folder of safetensors, torch or npz files. Quantized GGUF tensors are decoded on reading; rotary
/// rows of q and k are put into Hugging Face order.
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

  /// One tensor.
  struct Info {
    std::string name;                 ///< Hugging Face's
    std::vector<std::int64_t> shape;  ///< of the dense values
    std::string stored_type;          ///< "Q4_1", "bf16" ...
    std::int64_t stored_bytes = 0;    ///< as they lie in the file
  };
  virtual const std::vector<Info>& tensors() const = 0;  ///< in the order of the file
  /// Decodes rows [row_begin, row_end) of a tensor (1-D: one row of all elements) into `out`, as
  /// f32, f16 or bf16. Throws Error{kShape}, Error{kUnsupported}.
  virtual void read_rows(const std::string& name, std::int64_t row_begin, std::int64_t row_end,
                         DType dtype, void* out, const Executor& executor) const = 0;
};

// ------------------------------------------------------------------ loading

/// A quantized model in memory: packed layers by module path, everything else dense.
struct Checkpoint {
  std::string config_json = "{}";  ///< config.json as it stands, quantization settings included
  std::string layout;              ///< "bnb transformers", "hqq guide", "gguf", "dense" ...
  SideTexts texts;                 ///< small JSON files beside the weights, the tokenizer's files
  std::map<std::string, PackedMatrix> layers;  ///< by module path
  std::map<std::string, TensorView> tensors;   ///< by full tensor name; borrowed from `owners`
  std::vector<std::shared_ptr<void>> owners;   ///< keeps mappings and buffers alive
  std::vector<std::string> notes;  ///< what was ignored or chosen while reading, for a report
};

/// Of load_checkpoint and CheckpointReader.
struct LoadOptions {
  /// Shape of a module's dense weight; formats that do not store it (Quanto with groups) need it.
  /// Without it, or where it returns an empty shape, the sizes of a llama-like config.json are
  /// used.
  std::function<std::vector<std::int64_t>(const std::string& module)> weight_shape;
  /// Layers are imported in parallel on it; null: on the calling thread.
  const Executor* executor = nullptr;
  /// Compares the content with the digest in quantal.json, where there is one; reads every byte.
  bool verify_digest = false;
};

/// Reads what any supported tool wrote; the format is recognized by content, not by suffix. Folders
/// (config.json and weights, sharded or not, in safetensors, torch or npz files), single
/// safetensors, torch, npz and GGUF files. Dense tensors stay views of mapped files where the file
/// allows it. Throws Error{kCorrupt} naming, layer by layer, missing, extra and misshapen tensors;
/// Error{kUnsupported} for a quantization that no dialect knows; "No checkpoint found in {path}"
/// (Error{kIo}) names what was looked for.
Checkpoint load_checkpoint(const std::string& path, const LoadOptions& options = {});

/// Reads layer by layer instead of all at once, for conversion and shard-direct loading: memory
/// holds one layer at a time. Reading different layers from several threads is safe.
class CheckpointReader {
 public:
  /// Throws what load_checkpoint throws, but finds faults of a layer only on reading it.
  static std::unique_ptr<CheckpointReader> open(const std::string& path,
                                                const LoadOptions& options = {});
  virtual ~CheckpointReader() = default;
  virtual const std::string& config_json() const = 0;  ///< as Checkpoint::config_json
  virtual const std::string& layout() const = 0;       ///< as Checkpoint::layout
  virtual const SideTexts& texts() const = 0;          ///< as Checkpoint::texts
  /// Module paths of packed layers, and names of dense tensors, in order of name.
  virtual const std::vector<std::string>& layer_names() const = 0;
  virtual const std::vector<std::string>& tensor_names() const = 0;  ///< dense tensors
  /// Throws Error{kConfig} for a name that is not in the list; Error{kCorrupt} / Error{kShape} for
  /// a layer that contradicts itself.
  virtual PackedMatrix read_layer(const std::string& name) const = 0;
  /// Codes of rows of a packed layer, rows `stat_rows` of its statistics (kRowRuns: those of the
  /// same rows; else layout_of(spec).stat_rows of them) and `shared`: the bytes of read_layer
  /// there, for every cut. Of a mapped file only what stored_layer.h says is touched; tensors of
  /// torch and npz files, which have checksums, are read whole, and copied where they are not
  /// aligned to their elements, as in safetensors files. Memory: the result, and what has to be
  /// copied. Throws Error{kShape} for other ranges; what read_layer throws, for these rows.
  virtual PackedRows read_layer_rows(const std::string& name, RowRange rows,
                                     RowRange stat_rows) const = 0;
  /// Form of a layer. Reads no more than opening it does (stored_layer.h), and settings only where
  /// a layer of the same form was seen before.
  virtual PackedSpec layer_spec(const std::string& name) const = 0;
  /// dtype and shape only; `bytes` is empty.
  virtual TensorView describe_tensor(const std::string& name) const = 0;
  virtual Tensor read_tensor(const std::string& name) const = 0;  ///< throws as read_layer
  /// Copies entries [begin, end) of the first dimension of a tensor, in its own dtype, into `out`
  /// of exactly that many bytes. Other entries are not touched where the file is mapped. Throws
  /// Error{kShape} for a range outside of the tensor and for another size of `out`.
  virtual void read_rows(const std::string& name, std::int64_t begin, std::int64_t end,
                         std::span<std::uint8_t> out) const = 0;
};

/// The tokenizer of a folder (tokenizer.json, vocab.json, chat_template.jinja ..., by file name;
/// may hold any bytes) or of a GGUF file ("tokenizer.gguf"), for CheckpointView::texts; empty if
/// there is none. Throws Error{kIo}.
SideTexts read_tokenizer(const std::string& path);

// ------------------------------------------------------------------ saving

/// What save_checkpoint writes.
struct CheckpointView {
  std::string config_json = "{}";  ///< model config; the layout's settings are merged into it
  std::vector<std::pair<std::string, PackedView>> layers;   ///< by module path
  std::vector<std::pair<std::string, TensorView>> tensors;  ///< by full name
  /// Linear modules that stay dense (skip lists of configs). Empty: every dense 2-D weight that is
  /// not an embedding.
  std::vector<std::string> dense;
  /// Checkpoint::texts of the source. The tokenizer and the generation settings among them are
  /// written beside the weights or into the GGUF file; settings of a quantization are not.
  SideTexts texts{};
};

/// Of save_checkpoint.
struct SaveOptions {
  /// FileLayout::name, also with the dialect before it ("guide", "hqq guide"); empty: by path (the
  /// suffix of a single file) or the dialect's default.
  std::string layout{};
  /// Folders of safetensors or flat torch files: larger models are sharded; 0 = never.
  std::int64_t max_shard_bytes = 0;
  bool overwrite = false;  ///< replace what exists and quantal did not write
};
/// Layouts that a model of this dialect (null: without quantized layers) can be written in.
std::vector<FileLayout> file_layouts(const Dialect* dialect);

/// Writes a folder or a single file in one of the layouts of the layers' dialect (all layers must
/// be of one dialect; a model without any is written dense). It appears whole or not at all; an
/// existing folder that quantal did not write is refused unless `overwrite`. Memory beyond the
/// view: one exported layer at a time. Throws Error{kIo}, Error{kConfig}.
void save_checkpoint(const std::string& path, const CheckpointView& view,
                     const SaveOptions& options = {});

/// The digest of a model whose layers are seen one at a time, in any order: SHA-256 over the sorted
/// names, each with the SHA-256 of its content: layers (spec, codes, stats, shared), then tensors
/// (dtype, shape, bytes).
class ModelDigest {
 public:
  void add_layer(const std::string& name, const PackedView& layer);    ///< a packed layer
  void add_tensor(const std::string& name, const TensorView& tensor);  ///< a dense tensor
  std::string hex() const;                                             ///< of what was added so far

 private:
  std::map<std::string, std::string> layers_, tensors_;
};
/// SHA-256 (hex) over names, specs and bytes of all layers and tensors, in name order; equal
/// digests mean equal models.
std::string checkpoint_digest(const CheckpointView& view);

/// Human-readable description of a file or folder: the cli's `inspect`.
std::string inspect_text(const std::string& path, bool all_tensors);
/// The same facts, every tensor included, as a JSON object.
std::string inspect_json(const std::string& path);

/// What each dialect reads, writes and converts to without loss, as a Markdown table.
std::string formats_markdown();

// ------------------------------------------------------------------ conversion

/// Options that follow the source: bits, group size, quant_type and mode as it has them.
QuantizeOptions follow_source();

/// Of convert.
struct ConvertOptions {
  std::string to;  ///< dialect: "bnb", "hqq", "mlx", "quanto", "gguf", or "dense"
  /// Members that are 0 or empty follow the source. value_dtype is not read.
  QuantizeOptions quantize = follow_source();
  /// dtype of dequantized values (and, where a dialect stores them so, of scales); unset: that of
  /// the source.
  std::optional<DType> value_dtype{};
  SaveOptions save{};          ///< layout and shards of the target
  bool lossless_only = false;  ///< Error{kUnsupported} naming the first layer that would lose
  /// Of weights that are decoded: by "dense", and embeddings by others. Unset: that of the model by
  /// its config.json, else that of the values. Set with "dense", config.json names it.
  std::optional<DType> dense_dtype{};
  /// Linear layers of a dense source that stay dense, as skip_modules of QuantizationConfig.
  std::vector<std::string> skip_modules = {"lm_head"};
  const Executor* executor = nullptr;  ///< null: the calling thread
  /// Called before each layer or tensor, and once with done == total.
  std::function<void(std::int64_t done, std::int64_t total, const std::string& name)> progress{};
};

/// What became of each layer.
struct ConvertReport {
  /// One quantized layer.
  struct Layer {
    std::string name;           ///< module path or tensor
    std::string from;           ///< form: "gguf Q4_1", "bf16"
    std::string to;             ///< form: "mlx 4-bit, group 32"
    Preservation kept;          ///< what survives
    double relative_error = 0;  ///< of dequantized values; convert only
  };
  std::string layout;         ///< of the target: "mlx mlx-lm"
  std::vector<Layer> layers;  ///< quantized before or after
  std::int64_t copied = 0;    ///< dense tensors taken over as they are
  bool measured = false;      ///< relative_error is known
  bool lossless() const;      ///< no layer loses anything
  std::string text() const;   ///< a table for people
};

/// States, without quantizing anything, what a conversion would preserve, layer by layer. The
/// suffix of `to_path` chooses the layout as in convert; empty: the default one.
ConvertReport plan_convert(const std::string& from, const ConvertOptions& options,
                           const std::string& to_path = {});
/// Converts tensor by tensor: anonymous memory grows by at most three times the largest tensor.
/// Writes `to_path` atomically. Dense tensors are copied; files beside the weights of a folder
/// (tokenizer, generation config) are copied into a folder. Throws what load_checkpoint,
/// transcode and save_checkpoint throw.
ConvertReport convert(const std::string& from, const std::string& to_path,
                      const ConvertOptions& options);

}  // namespace quantal

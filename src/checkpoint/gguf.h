// GGUF files as whole models: reading without decoding, and writing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/reader.h"
#include "checkpoint/spool.h"
#include "quantal/checkpoint.h"
#include "quantal/ggml.h"

namespace quantal::checkpoint {

/// Name among SideTexts of the general.* and tokenizer.* pairs of a GGUF file, as the bytes of a
/// GGUF file without tensors. Written into a folder it is a file that llama.cpp reads as
/// vocabulary.
inline constexpr const char* kTokenizerGguf = "tokenizer.gguf";

/// A GGUF file whose 2-D weights of a packable type (embeddings too) are layers of the gguf dialect
/// and whose other tensors are dense: F32, F16 and BF16 as they are, anything else as f32. Names
/// and row order are those of Hugging Face. Throws Error{kIo}, Error{kCorrupt}; Error{kUnsupported}
/// for architectures other than llama and types that are not decoded.
std::unique_ptr<ModelReader> open_gguf_reader(const std::string& path, const LoadOptions& options);

/// llama.* pairs (and general.architecture) of a Hugging Face config.json. `vocab` is the number of
/// rows of the embedding. Throws Error{kUnsupported} for other architectures, activations and
/// rotary scalings, Error{kConfig} naming a key that is missing or of another type.
std::vector<GgufPair> gguf_llama_pairs(const std::string& config_json, std::int64_t vocab);
/// Factors of rope_freqs.weight for a llama3 rope_scaling; empty for models without it.
std::vector<float> gguf_rope_factors(const std::string& config_json);

/// general.* and tokenizer.* pairs. From texts[kTokenizerGguf] where it is there, else from the
/// Hugging Face files tokenizer.json, tokenizer_config.json and chat_template.jinja (byte-level BPE
/// and SentencePiece-like BPE); without either a model without vocabulary. `vocab` as above:
/// missing tokens are filled up with unused ones. Throws Error{kUnsupported} for tokenizers that
/// GGUF has no form for, Error{kCorrupt} naming file and key.
std::vector<GgufPair> gguf_tokenizer_pairs(const SideTexts& texts, const std::string& config_json,
                                           std::int64_t vocab);

/// Writes a llama model as a GGUF file. Tensors wait in an unnamed file beside the target until the
/// config is known; memory holds one tensor. `commit` makes the file visible, a destructor without
/// it leaves nothing. Not thread-safe.
class GgufModelWriter {
 public:
  explicit GgufModelWriter(const std::string& path);  ///< throws Error{kIo}

  /// A layer of the gguf dialect; `name` is its module ("model.layers.0.mlp.up_proj").
  void add_layer(const std::string& name, const PackedView& layer);
  /// Vectors become F32, matrices keep f32, f16 or bf16. Throws Error{kUnsupported} for names
  /// without a counterpart, Error{kDtype}.
  void add_tensor(const std::string& name, const TensorView& tensor);
  /// Throws what gguf_llama_pairs and gguf_tokenizer_pairs throw; Error{kConfig} naming a tensor
  /// that a llama model of this config lacks or that contradicts it; Error{kIo}.
  void commit(const std::string& config_json, const SideTexts& texts);

 private:
  struct Waiting {
    std::string hf, gguf;
    GgmlType type;
    std::vector<std::int64_t> shape;
    std::size_t number = 0;  ///< in the spool
  };
  void add(const std::string& name, GgmlType type, const std::vector<std::int64_t>& shape,
           std::span<const std::uint8_t> bytes);
  const Waiting* find(const std::string& gguf) const;
  void check_complete(const std::vector<GgufPair>& llama) const;
  std::uint64_t file_type() const;

  std::string path_;
  Spool spool_;
  std::vector<Waiting> tensors_;
};

}  // namespace quantal::checkpoint

// What `inspect` found, before it becomes text or JSON.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace quantal::checkpoint {

/// One tensor of a file, or one quantized layer (all its tensors together).
struct InspectedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::string type;  ///< "Q4_1", "bf16", "bnb 4-bit g64 ..."
  std::int64_t parameters = 0;
  std::int64_t bytes = 0;
  bool quantized_layer = false;
};

struct Inspection {
  std::string path;
  std::string container;  ///< "GGUF version 3", "safetensors, 2 files", "npy"
  std::string layout;     ///< "hqq guide", "dense transformers"; empty for GGUF and npy
  std::vector<std::pair<std::string, std::string>> metadata;
  std::string quantization;        ///< dialects of the quantized layers
  std::string unread;              ///< why quantized layers cannot be read, if so
  std::vector<std::string> notes;  ///< what was ignored or chosen
  std::vector<InspectedTensor> tensors;
};

/// Opens a GGUF, safetensors or npy file or a folder. Throws Error of the reader in question.
Inspection inspect(const std::string& path);

}  // namespace quantal::checkpoint

// All tensors of a folder or file by name, whatever container they lie in.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/locate.h"
#include "quantal/formats.h"
#include "quantal/io.h"

namespace quantal::checkpoint {

/// A tensor of a file before its bytes are there.
struct StoredTensor {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  StateKind kind = StateKind::kTensor;
  /// A view of the mapping where the file allows it, else a copy. Aligned to the element type.
  /// Thread-safe. Throws Error{kCorrupt}.
  std::function<HeldTensor()> read;

  std::int64_t bytes() const;
};

struct TensorSet {
  Located where;
  StateTree tree = StateTree::kFlat;
  std::string description;  ///< "safetensors, 3 files"
  std::map<std::string, StoredTensor> tensors;
  std::set<std::string> second_names;           ///< of tensors that are there: a tied head
  std::map<std::string, std::string> metadata;  ///< of a single safetensors file
  SideTexts texts;                              ///< config.json among them, if there is one
  std::vector<std::string> notes;

  const std::string& path() const { return where.path; }
  /// Text of config.json, "{}" without one.
  const std::string& config_json() const;
};

/// Opens what `locate` found; GGUF files are not tensor sets (Error{kInternal}). Tensors that an
/// index does not name are left out. Throws Error{kIo}, Error{kCorrupt}, Error{kUnsupported}.
TensorSet open_tensor_set(const Located& where);
TensorSet open_tensor_set(const std::string& path);  ///< locate, then open

/// Adds the tensors of one file of any container that is not GGUF; `tree` and `texts` too.
void add_safetensors(TensorSet& set, const std::string& path);
void add_npz(TensorSet& set, const std::string& path);
void add_torch(TensorSet& set, const std::string& path);

}  // namespace quantal::checkpoint

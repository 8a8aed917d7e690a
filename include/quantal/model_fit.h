// quantal model_fit: does a file fit a model? Names, forms and shapes are compared before anything
// is changed, so that a load that fails leaves the model as it was. Part of the room checkpoint.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "quantal/checkpoint.h"
#include "quantal/policy.h"

namespace quantal {

/// What a model has room for.
struct ModelParts {
  using Shape = std::vector<std::int64_t>;  ///< sizes, slowest dimension first
  /// Every tensor by full name, as if no weight were packed: "<module>.weight" of linear layers
  /// and embeddings included.
  std::map<std::string, Shape> tensors;
  /// Modules that can hold a packed weight. Linear layers are compared with the config.
  std::set<std::string> linears;
  std::set<std::string> embeddings;  ///< see linears
  /// Tensors that are one with another: {"lm_head.weight": "model.embed_tokens.weight"}. A file
  /// may have either or both. Names that `tensors` lacks have no meaning.
  std::map<std::string, std::string> tied{};
};

/// The comparison, key by key.
struct LoadReport {
  /// A tensor that has other sizes than the model.
  struct Misshapen {
    std::string name;                    ///< full name
    std::vector<std::int64_t> in_file;   ///< sizes
    std::vector<std::int64_t> in_model;  ///< sizes
  };
  std::string layout;                   ///< of the file: "hqq transformers", "gguf gguf" ...
  std::vector<std::string> missing;     ///< tensors of the model that the file lacks
  std::vector<std::string> unexpected;  ///< tensors and packed layers that the model lacks
  std::vector<Misshapen> misshapen;     ///< other sizes in file and model
  /// Layers that are packed in the file and stand in a module that cannot hold them packed.
  std::vector<std::string> decoded;
  /// Where the file overrules the config: "method", "bits", "group_size", "quant_type",
  /// "double_quant", "form" (any other difference of two forms) and "skip_modules" (a layer that
  /// only one of them quantizes). Layers that differ alike share an entry. compute_dtype and the
  /// dtype of the values are not compared.
  std::vector<Substitution> settings;
  std::vector<std::string> notes;  ///< Checkpoint::notes

  /// Nothing is missing, too much or misshapen.
  bool fits() const { return missing.empty() && unexpected.empty() && misshapen.empty(); }
  /// One line per finding, for people; "" if there is none.
  std::string text() const;
  /// "2 missing: a, b; 1 unexpected: c; ..." with at most `shown` names of a kind.
  std::string summary(std::size_t shown = 32) const;
  /// One sentence about `settings` for a warning; "" if there are none.
  std::string settings_text() const;
};

/// Packed layers and dense tensors of a file, by name.
struct FileParts {
  std::map<std::string, PackedSpec> layers;          ///< forms by module path
  std::map<std::string, ModelParts::Shape> tensors;  ///< sizes by full name
};
/// Names, forms and sizes of what was read.
FileParts parts_of(const Checkpoint& file);

/// Compares a file with a model; `config` null: settings are not compared. Throws what LayerRules
/// throws.
LoadReport compare_model(const FileParts& file, const ModelParts& model,
                         const QuantizationConfig* config);
/// Throws Error{kCorrupt} with the summary unless report.fits().
void require_fit(const LoadReport& report, const std::string& path);

}  // namespace quantal

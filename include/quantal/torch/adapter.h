// The adapters of the public API over torch::nn::Module; names and meaning as in Python.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/checkpoint.h"
#include "quantal/model_fit.h"
#include "quantal/policy.h"
#include "quantal/torch/linear.h"

namespace quantal {

struct LoadModelOptions {
  /// False: what is missing, unexpected or misshapen is in the report only; such tensors of the
  /// model stay as they are.
  bool strict = true;
};

/// What a load found out. config_json and texts are what save_quantized_model takes.
struct LoadedModel {
  LoadReport report;
  std::string config_json;  ///< of the file, quantization settings included
  SideTexts texts;          ///< tokenizer and other small files
};

/// Turns models into quantized ones. Derive from it for a method of your own: only the three pure
/// functions must be written, and quantize_model may call replace_linear_with_quantized.
/// Not thread-safe.
class QuantizationAdapter {
 public:
  /// `config` is resolved (Decision::config).
  QuantizationAdapter(Backend backend, QuantizationConfig config);
  virtual ~QuantizationAdapter();

  /// A layer of the adapter's kind; packed values are zero until they are loaded or set.
  virtual Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                         bool bias = true) = 0;
  /// Quantizes, in place, every quantal::Linear that the config does not skip; fills report().
  virtual void quantize_model(torch::nn::Module& model) = 0;
  /// Freezes everything and switches to training mode; adapters are added afterwards (add_lora).
  virtual void prepare_model_for_training(torch::nn::Module& model) = 0;

  /// Exchanges one layer's weight for its packed form, as `choice` says; used by
  /// replace_linear_with_quantized. Returns ||W - deq(W)||_F / ||W||_F.
  virtual double quantize_linear(LinearImpl& layer, const LayerRules::Choice& choice);

  /// Writes a folder or file in one of the layouts of the dialect (file_layouts) with the base
  /// weights only; adapters have save_lora_adapter. Packed layers are written from their packed
  /// form, wherever they came from.
  ///
  /// config_json  the model's own config.json
  /// texts        tokenizer and generation settings to be written beside the weights or into a GGUF
  ///              file: LoadedModel::texts, or read_tokenizer(folder)
  ///
  /// What exists and was not written by quantal is refused unless options.overwrite.
  virtual void save_quantized_model(torch::nn::Module& model, const std::string& path,
                                    const std::string& config_json = "{}",
                                    const SaveOptions& options = {}, const SideTexts& texts = {});
  /// Loads a folder or file that quantal or an upstream package wrote into a model of the right
  /// structure: linear layers and embeddings become packed where the file has them packed, other
  /// tensors are copied. The dense memory of a packed layer is never read or written.
  ///
  /// Format, method and settings are those of the file, found from its content; where this
  /// adapter's config says something else, warnings() and report().substitutions tell.
  /// compute_dtype is the adapter's. Names and shapes are compared before anything changes:
  /// Error{kCorrupt} lists what is missing, unexpected and misshapen.
  virtual LoadedModel load_quantized_model(const std::string& path, torch::nn::Module& model,
                                           const LoadModelOptions& options = {});

  Backend backend() const { return backend_; }
  const QuantizationConfig& config() const { return config_; }
  const CoverageReport& report() const { return report_; }
  CoverageReport& report() { return report_; }
  /// What the factory and the last load want the user to see.
  const std::vector<std::string>& warnings() const { return warnings_; }
  void set_decision(const Decision& decision);

 private:
  void note_load(const LoadReport& load);

  Backend backend_;
  QuantizationConfig config_;
  CoverageReport report_;
  std::vector<std::string> warnings_;
  std::vector<Substitution> file_settings_;  ///< of the last load
  std::string file_warning_;
};

/// What the concrete adapters share: quantization through a dialect of the registry.
class DialectAdapter : public QuantizationAdapter {
 public:
  Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                 bool bias = true) override;
  void quantize_model(torch::nn::Module& model) override;
  void prepare_model_for_training(torch::nn::Module& model) override;

 protected:
  /// `name` is the class's. Constructed directly for a backend that the documented matrix does not
  /// have, an adapter throws Error{kUnsupported} unless backend_options "support" is "extended".
  DialectAdapter(std::string_view name, Backend backend, const QuantizationConfig& config);
};

/// HQQ, any backend.
class HQQAdapter final : public DialectAdapter {
 public:
  HQQAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("HQQAdapter", backend, config) {}
};

/// bitsandbytes NF4, FP4 and LLM.int8.
class BitsAndBytesAdapter final : public DialectAdapter {
 public:
  BitsAndBytesAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("BitsAndBytesAdapter", backend, config) {}
};

/// MLX affine 4 and 8 bits, and the MX formats through backend_options "mode".
class MLXAdapter final : public DialectAdapter {
 public:
  MLXAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("MLXAdapter", backend, config) {}
};

/// Quanto int2, int4 and int8.
class QuantoAdapter final : public DialectAdapter {
 public:
  QuantoAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("QuantoAdapter", backend, config) {}
};

/// Leaves models as they are; warnings() says why.
class FallbackAdapter final : public QuantizationAdapter {
 public:
  using QuantizationAdapter::QuantizationAdapter;
  Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                 bool bias = true) override;
  void quantize_model(torch::nn::Module& model) override;
  void prepare_model_for_training(torch::nn::Module& model) override;
};

/// The adapter that decide_adapter chooses, with its warnings and substitutions. Throws as
/// decide_adapter.
std::unique_ptr<QuantizationAdapter> create_quantization_adapter(
    Backend backend, const QuantizationConfig& config = {}, std::optional<Support> support = {},
    std::optional<Fallback> fallback = {});

/// Quantizes layer by layer, in place, each dense weight freed before the next is read, and fills
/// adapter.report(). `skip_modules` replaces the config's list; an empty list skips nothing. Plain
/// torch::nn::Linear layers cannot be exchanged from outside and are reported as dense.
void replace_linear_with_quantized(
    torch::nn::Module& model, QuantizationAdapter& adapter,
    const std::optional<std::vector<std::string>>& skip_modules = {});

}  // namespace quantal

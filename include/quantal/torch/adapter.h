// The adapters of the public API over torch::nn::Module; names and meaning as in Python.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <typeindex>
#include <vector>

#include "quantal/checkpoint.h"
#include "quantal/model_fit.h"
#include "quantal/policy.h"
#include "quantal/torch/linear.h"
#include "quantal/torch/training.h"

namespace quantal {

/// Of QuantizationAdapter::load_quantized_model.
struct LoadModelOptions {
  /// False: what is missing, unexpected or misshapen is in the report only; such tensors of the
  /// model stay as they are.
  bool strict = true;
};

/// What a load found out. config_json and texts are what save_quantized_model takes.
struct LoadedModel {
  LoadReport report;        ///< key by key
  std::string config_json;  ///< of the file, quantization settings included
  SideTexts texts;          ///< tokenizer and other small files
};

/// Turns models into quantized ones. Derive from it for a method of your own: only the two pure
/// functions must be written, and quantize_model may call replace_linear_with_quantized;
/// register_adapter gives it a name. Not thread-safe.
class QuantizationAdapter {
 public:
  /// `config` is resolved (Decision::config).
  QuantizationAdapter(Backend backend, QuantizationConfig config);
  virtual ~QuantizationAdapter();

  /// Throws if this adapter cannot be used with its backend. The factory calls it; a constructor
  /// cannot, so whoever constructs an adapter directly does. Default: nothing is refused.
  virtual void validate_backend_support() const {}
  /// A layer of the adapter's kind; values are zero until they are loaded or set. An adapter of
  /// one's own is asked while config() has what layer_configs say of the layer, and returns
  /// Linear(std::shared_ptr<QuantizedLayerImpl>) or a packed Linear.
  virtual Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                         bool bias = true) = 0;
  /// Quantizes, in place, every quantal::Linear that the config does not skip; fills report().
  virtual void quantize_model(torch::nn::Module& model) = 0;
  /// Freezes the base and switches to training mode; adapters are added afterwards (add_lora).
  /// Default: the function of that name, with default options.
  virtual void prepare_model_for_training(torch::nn::Module& model);

  /// Exchanges one layer's dense weight for a quantized form, as `choice` says; used by
  /// replace_linear_with_quantized. Returns ||W - deq(W)||_F / ||W||_F. Default: the form of
  /// create_quantized_linear takes the weight over with quantize_weights and keeps the bias; where
  /// layer_configs name a built-in method, the layer becomes quantal's own.
  virtual double quantize_linear(LinearImpl& layer, const LayerRules::Choice& choice);
  /// Decides which layers are quantized; `skip_modules` replaces the config's list. An adapter of
  /// one's own quantizes all that skip_modules and layer_configs leave.
  virtual LayerRules layer_rules(
      const std::optional<std::vector<std::string>>& skip_modules = {}) const;

  /// Writes a folder or file in one of the layouts of the dialect (file_layouts) with the base
  /// weights only; adapters have save_lora_adapter. Packed layers are written from their packed
  /// form, wherever they came from.
  ///
  /// config_json  the model's own config.json
  /// texts        tokenizer and generation settings to be written beside the weights or into a GGUF
  ///              file: LoadedModel::texts, or read_tokenizer(folder)
  ///
  /// What exists and was not written by quantal is refused unless options.overwrite. A registered
  /// adapter's name and config are written into config.json, for loading.
  virtual void save_quantized_model(torch::nn::Module& model, const std::string& path,
                                    const std::string& config_json = "{}",
                                    const SaveOptions& options = {}, const SideTexts& texts = {});
  /// Loads a folder or file that quantal or an upstream package wrote into a model of the right
  /// structure: linear layers and embeddings become packed where the file has them packed, other
  /// tensors are copied. The dense memory of a packed layer is never read or written.
  ///
  /// Format, method and settings are those of the file, found from its content; where this
  /// adapter's config says something else, warnings() and report().substitutions tell.
  /// compute_dtype is the adapter's. A model that a registered adapter saved gets that adapter's
  /// layers, whichever adapter loads it; Error{kUnsupported} names one that is not registered here.
  /// Names and shapes are compared before anything changes:
  /// Error{kCorrupt} lists what is missing, unexpected and misshapen.
  virtual LoadedModel load_quantized_model(const std::string& path, torch::nn::Module& model,
                                           const LoadModelOptions& options = {});

  Backend backend() const { return backend_; }                  ///< as constructed
  const QuantizationConfig& config() const { return config_; }  ///< resolved
  const CoverageReport& report() const { return report_; }      ///< what was done, and changed
  CoverageReport& report() { return report_; }                  ///< the same, to be filled
  /// What the factory and the last load want the user to see.
  const std::vector<std::string>& warnings() const { return warnings_; }
  /// Name under which the adapter is registered (register_adapter); empty if it is not.
  std::string registered_name() const;
  /// Takes warnings and substitutions over; the factory calls it.
  void set_decision(const Decision& decision);

 protected:
  /// create_quantized_linear while config() has what `choice` says of the layer.
  Linear layer_for(const LayerRules::Choice& choice, std::int64_t in_features,
                   std::int64_t out_features, bool bias);

 private:
  friend class CustomLayers;  // src/torch/custom.h
  void note_load(const LoadReport& load);

  Backend backend_;
  QuantizationConfig config_;
  CoverageReport report_;
  std::vector<std::string> warnings_;
  std::vector<Substitution> file_settings_;  ///< of the last load
  std::string file_warning_;
  std::string registered_name_;
};

/// What the concrete adapters share: quantization through a dialect of the registry.
class DialectAdapter : public QuantizationAdapter {
 public:
  Linear create_quantized_linear(std::int64_t in_features, std::int64_t out_features,
                                 bool bias = true) override;
  void quantize_model(torch::nn::Module& model) override;
  double quantize_linear(LinearImpl& layer, const LayerRules::Choice& choice) override;
  LayerRules layer_rules(
      const std::optional<std::vector<std::string>>& skip_modules = {}) const override;

 protected:
  /// `name` is the class's. Constructed directly for a backend that the documented matrix does not
  /// have, an adapter throws Error{kUnsupported} unless backend_options "support" is "extended".
  DialectAdapter(std::string_view name, Backend backend, const QuantizationConfig& config);
};

/// HQQ, any backend.
class HQQAdapter final : public DialectAdapter {
 public:
  /// As DialectAdapter.
  HQQAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("HQQAdapter", backend, config) {}
};

/// bitsandbytes NF4, FP4 and LLM.int8.
class BitsAndBytesAdapter final : public DialectAdapter {
 public:
  /// As DialectAdapter.
  BitsAndBytesAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("BitsAndBytesAdapter", backend, config) {}
};

/// MLX affine 4 and 8 bits, and the MX formats through backend_options "mode".
class MLXAdapter final : public DialectAdapter {
 public:
  /// As DialectAdapter.
  MLXAdapter(Backend backend, const QuantizationConfig& config)
      : DialectAdapter("MLXAdapter", backend, config) {}
};

/// Quanto int2, int4 and int8.
class QuantoAdapter final : public DialectAdapter {
 public:
  /// As DialectAdapter.
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

/// Makes an adapter for a backend and a resolved config.
using AdapterFactory = std::function<std::unique_ptr<QuantizationAdapter>(
    Backend backend, const QuantizationConfig& config)>;
/// Makes an adapter of one's own a method that configs, factory and files know by name.
///
/// name     of the method: lower-case letters, digits and underscores, not a built-in one. Configs
///          name it with custom_method, in JSON with "method".
/// replace  take another factory for a name that is in use
///
/// Afterwards create_quantization_adapter answers with the adapter on every backend (whether it can
/// run there is for validate_backend_support to say), skip_modules and layer_configs count, and a
/// folder that it saved is loaded by it. The registration belongs to the program. Throws
/// Error{kConfig} for a name that is no identifier, is built in or is in use. Thread-safe.
void register_adapter(const std::string& name, AdapterFactory factory, bool replace = false);
/// The same for a class that is constructed from (Backend, const QuantizationConfig&); its adapters
/// have the name wherever they are constructed. Registering a class again changes nothing.
template <class Adapter>
void register_adapter(const std::string& name, bool replace = false);
/// Names of register_adapter, sorted.
std::vector<std::string> registered_adapters();

/// The adapter that decide_adapter chooses, with its warnings and substitutions. Throws as
/// decide_adapter and validate_backend_support.
std::unique_ptr<QuantizationAdapter> create_quantization_adapter(
    Backend backend, const QuantizationConfig& config = {}, std::optional<Support> support = {},
    std::optional<Fallback> fallback = {});

/// Quantizes layer by layer, in place, each dense weight freed before the next is read, and fills
/// adapter.report(). `skip_modules` replaces the config's list; an empty list skips nothing. Plain
/// torch::nn::Linear layers cannot be exchanged from outside and are reported as dense.
void replace_linear_with_quantized(
    torch::nn::Module& model, QuantizationAdapter& adapter,
    const std::optional<std::vector<std::string>>& skip_modules = {});

/// Of the template above.
void register_adapter_type(const std::string& name, AdapterFactory factory, std::type_index type,
                           bool replace);
template <class Adapter>
void register_adapter(const std::string& name, bool replace) {
  register_adapter_type(
      name,
      [](Backend backend, const QuantizationConfig& config) {
        return std::make_unique<Adapter>(backend, config);
      },
      typeid(Adapter), replace);
}

}  // namespace quantal

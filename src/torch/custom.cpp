#include "torch/custom.h"

#include <torch/torch.h>

#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace quantal {
namespace {

using Json = nlohmann::ordered_json;

/// Key of config.json under which a model keeps the adapter that wrote it; as in Python.
constexpr const char* kAdapterKey = "quantal_adapter";

struct Entry {
  AdapterFactory make;
  std::type_index type = typeid(void);
};

struct Registry {
  std::mutex guard;
  std::map<std::string, Entry> entries;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

std::string known_names() {
  std::string text = "BitsAndBytesAdapter, HQQAdapter, MLXAdapter, QuantoAdapter, FallbackAdapter";
  for (const std::string& name : registered_adapters()) text += ", " + name;
  return text;
}

bool is_dialect_adapter(const QuantizationAdapter& adapter) {
  return dynamic_cast<const DialectAdapter*>(&adapter) != nullptr ||
         dynamic_cast<const FallbackAdapter*>(&adapter) != nullptr;
}

bool is_registered(const std::string& name) {
  Registry& all = registry();
  const std::lock_guard lock(all.guard);
  return all.entries.contains(name);
}

/// The entry of a file's config.json; null if quantal's own adapters wrote it.
Json adapter_entry(const std::string& config_json) {
  const Json config = Json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  return config.is_object() && config.contains(kAdapterKey) ? config[kAdapterKey] : Json();
}

/// The registered adapter that wrote a file; null if none did.
std::unique_ptr<QuantizationAdapter> writer_of(const std::string& config_json,
                                               const std::string& path, bool required) {
  const Json entry = adapter_entry(config_json);
  if (entry.is_null()) return nullptr;
  if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string()) {
    fail(Errc::kCorrupt,
         std::string("load: ") + kAdapterKey +
             " in config.json has no name, expected that of an adapter",
         {path, "", -1});
  }
  const auto name = entry["name"].get<std::string>();
  if (!is_registered(name)) {
    if (!required) return nullptr;
    fail(Errc::kUnsupported,
         "load: the adapter '" + name +
             "' wrote this model and is not registered here, expected "
             "quantal::register_adapter(\"" +
             name + "\", ...) before it is loaded",
         {path, "", -1});
  }
  try {
    return make_registered(name, parse_backend(entry.value("backend", "cpu")),
                           config_from_json(entry.at("config").dump()));
  } catch (const std::exception& error) {
    fail(Errc::kCorrupt,
         std::string("load: ") + kAdapterKey + " in config.json cannot be used: " + error.what(),
         {path, "", -1});
  }
}

/// Names of the tensors of each module of a file.
std::map<std::string, std::set<std::string>> fields_of(const Checkpoint& file) {
  std::map<std::string, std::set<std::string>> fields;
  for (const auto& [name, view] : file.tensors) {
    const std::size_t dot = name.rfind('.');
    if (dot == std::string::npos) {
      fields[""].insert(name);
    } else {
      fields[name.substr(0, dot)].insert(name.substr(dot + 1));
    }
  }
  return fields;
}

}  // namespace

// ------------------------------------------------------------------ by name

void register_adapter_type(const std::string& name, AdapterFactory factory, std::type_index type,
                           bool replace) {
  if (!factory) fail(Errc::kConfig, "register_adapter: factory is empty, expected a function");
  register_custom_method(name);  // refuses what is no name
  Registry& all = registry();
  const std::lock_guard lock(all.guard);
  const auto known = all.entries.find(name);
  const bool same =
      known != all.entries.end() && type != typeid(void) && known->second.type == type;
  if (known != all.entries.end() && !same && !replace) {
    fail(Errc::kConfig, "register_adapter: name is '" + name +
                            "', which another adapter has, expected another name (or replace = "
                            "true)");
  }
  all.entries[name] = {std::move(factory), type};
}

void register_adapter(const std::string& name, AdapterFactory factory, bool replace) {
  register_adapter_type(name, std::move(factory), typeid(void), replace);
}

std::vector<std::string> registered_adapters() {
  Registry& all = registry();
  const std::lock_guard lock(all.guard);
  std::vector<std::string> names;
  for (const auto& [name, entry] : all.entries) names.push_back(name);
  return names;
}

std::unique_ptr<QuantizationAdapter> make_registered(const std::string& name, Backend backend,
                                                     const QuantizationConfig& config) {
  AdapterFactory make;
  {
    Registry& all = registry();
    const std::lock_guard lock(all.guard);
    const auto found = all.entries.find(name);
    if (found != all.entries.end()) make = found->second.make;
  }
  if (!make) {
    fail(Errc::kUnsupported, "create_quantization_adapter: " + name +
                                 " has no C++ adapter, expected one of " + known_names() +
                                 " (register_adapter adds some)");
  }
  std::unique_ptr<QuantizationAdapter> adapter = make(backend, config);
  if (!adapter) {
    fail(Errc::kConfig, "create_quantization_adapter: the factory of '" + name +
                            "' gave nothing, expected an adapter");
  }
  adapter->validate_backend_support();
  adapter->set_decision({.adapter = name, .config = config, .substitutions = {}, .warnings = {}});
  return adapter;
}

std::string QuantizationAdapter::registered_name() const {
  if (!registered_name_.empty()) return registered_name_;
  Registry& all = registry();
  const std::lock_guard lock(all.guard);
  for (const auto& [name, entry] : all.entries) {
    if (entry.type == typeid(*this)) return name;
  }
  return {};
}

// ------------------------------------------------------------------ one layer

LayerRules QuantizationAdapter::layer_rules(
    const std::optional<std::vector<std::string>>& skip_modules) const {
  QuantizationConfig rules = config_;
  if (skip_modules) rules.skip_modules = *skip_modules;
  const std::string name = registered_name();
  rules.method = QuantizationMethod::NONE;
  rules.custom_method = name.empty() ? "adapter" : name;
  return LayerRules(rules);
}

Linear QuantizationAdapter::layer_for(const LayerRules::Choice& choice, std::int64_t in_features,
                                      std::int64_t out_features, bool bias) {
  struct Restore {
    QuantizationConfig& target;
    QuantizationConfig whole;
    ~Restore() { target = std::move(whole); }
  } restore{config_, config_};
  config_.bits = choice.options.bits;
  config_.group_size = choice.options.group_size;
  config_.double_quant = choice.options.double_quant;
  config_.quant_type = choice.options.quant_type;
  if (config_.compute_dtype) config_.compute_dtype = choice.compute_dtype;
  return create_quantized_linear(in_features, out_features, bias);
}

// ------------------------------------------------------------------ in files

std::string with_adapter_entry(const std::string& config_json, const QuantizationAdapter& adapter) {
  const std::string name = adapter.registered_name();
  if (name.empty() && adapter_entry(config_json).is_null()) return config_json;
  Json config = Json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return config_json;  // for save_checkpoint to refuse
  config.erase(kAdapterKey);
  if (!name.empty()) {
    config[kAdapterKey] = {{"name", name},
                           {"backend", backend_name(adapter.backend())},
                           {"config", Json::parse(config_to_json(adapter.config()))}};
  }
  return config.dump();
}

CustomLayers::CustomLayers(const Checkpoint& file, torch::nn::Module& model,
                           QuantizationAdapter& reader, const std::string& path) {
  const bool own = !is_dialect_adapter(reader);
  const auto writer = writer_of(file.config_json, path, /*required=*/!own);
  if (!writer && !own) return;
  QuantizationAdapter& maker = writer ? *writer : reader;
  LayerRules rules = maker.layer_rules();
  const auto fields = fields_of(file);
  for (const auto& [name, layer] : named_linears(model)) {
    const auto found = fields.find(name);
    if (layer->custom || file.layers.contains(name) || found == fields.end()) continue;
    const std::set<std::string>& names = found->second;
    if (names.contains("weight") || names.size() == names.count("bias")) continue;
    const auto choice = rules.choose(name, layer->out_features, layer->in_features);
    const Linear made = maker.layer_for(choice, layer->in_features, layer->out_features,
                                        layer->current_bias().defined());
    if (made->custom) layers_[name] = made->custom;
  }
}

std::shared_ptr<QuantizedLayerImpl> CustomLayers::find(const std::string& name) const {
  const auto found = layers_.find(name);
  return found == layers_.end() ? nullptr : found->second;
}

}  // namespace quantal

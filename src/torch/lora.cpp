#include "quantal/torch/lora.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "quantal/io.h"
#include "torch/merge_state.h"
#include "torch/state.h"

namespace quantal {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kPrefix = "base_model.model.";

/// PEFT's rule: equal, or the last dotted components are equal.
bool name_matches(const std::string& name, const std::string& target) {
  return name == target || name.ends_with("." + target);
}

bool is_target(const std::string& name, const LoraConfig& config) {
  if (config.target_modules.size() == 1 && config.target_modules[0] == "all-linear") {
    return !name_matches(name, "lm_head");
  }
  return std::ranges::any_of(config.target_modules,
                             [&](const auto& target) { return name_matches(name, target); });
}

template <class Value>
Value from_pattern(const std::map<std::string, Value>& pattern, const std::string& name,
                   Value otherwise) {
  for (const auto& [key, value] : pattern) {
    if (name_matches(name, key)) return value;
  }
  return otherwise;
}

double scaling_of(const LoraConfig& config, const std::string& name, std::int64_t r) {
  const double alpha = from_pattern(config.alpha_pattern, name, config.lora_alpha);
  const auto rank = static_cast<double>(r);
  return alpha / (config.use_rslora ? std::sqrt(rank) : rank);
}

void check_config(const LoraConfig& config) {
  if (config.r < 1)
    fail(Errc::kConfig, "lora: r is " + std::to_string(config.r) + ", expected >= 1");
  if (!(config.lora_dropout >= 0 && config.lora_dropout < 1)) {
    fail(Errc::kConfig,
         "lora: lora_dropout is " + std::to_string(config.lora_dropout) + ", expected 0 <= p < 1");
  }
}

std::string linear_kinds(torch::nn::Module& model) {
  std::set<std::string> kinds;
  for (const auto& [name, layer] : named_linears(model)) {
    kinds.insert(name.substr(name.rfind('.') + 1));
  }
  std::string text;
  for (const auto& kind : kinds) text += (text.empty() ? "" : ", ") + kind;
  return text;
}

Json to_json(const LoraConfig& config) {
  const auto base =
      config.base_model_name_or_path.empty() ? Json(nullptr) : Json(config.base_model_name_or_path);
  return {{"peft_type", "LORA"},
          {"task_type", config.task_type},
          {"base_model_name_or_path", base},
          {"inference_mode", true},
          {"r", config.r},
          {"lora_alpha", config.lora_alpha},
          {"lora_dropout", config.lora_dropout},
          {"target_modules",
           config.target_modules.size() == 1 && config.target_modules[0] == "all-linear"
               ? Json("all-linear")
               : Json(config.target_modules)},
          {"rank_pattern", config.rank_pattern},
          {"alpha_pattern", config.alpha_pattern},
          {"use_rslora", config.use_rslora},
          {"use_dora", config.use_dora},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"init_lora_weights", true},
          {"modules_to_save", nullptr}};
}

/// Where PEFT's arithmetic differs from B A x and quantal has no form of it.
void refuse_variants(const Json& json, const std::string& path) {
  for (const char* name : {"lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"}) {
    if (json.contains(name) && json[name].is_boolean() && json[name].get<bool>()) {
      fail(Errc::kUnsupported, std::string("lora: ") + name + " is true, expected false",
           {path, "", -1});
    }
  }
  if (json.value("peft_type", "LORA") != "LORA") {
    fail(Errc::kUnsupported, "lora: peft_type is " + json["peft_type"].dump() + ", expected LORA",
         {path, "", -1});
  }
  if (json.contains("bias") && json["bias"] != "none") {
    fail(Errc::kUnsupported, "lora: bias is " + json["bias"].dump() + ", expected none",
         {path, "", -1});
  }
}

LoraConfig config_from(const Json& json) {
  LoraConfig config;
  config.r = json.at("r").get<std::int64_t>();
  config.lora_alpha = json.at("lora_alpha").get<double>();
  config.lora_dropout = json.value("lora_dropout", 0.0);
  const Json& targets = json.at("target_modules");
  config.target_modules = targets.is_string() ? std::vector<std::string>{targets.get<std::string>()}
                                              : targets.get<std::vector<std::string>>();
  config.use_rslora = json.value("use_rslora", false);
  config.use_dora = json.value("use_dora", false);
  if (json.contains("rank_pattern") && !json["rank_pattern"].is_null()) {
    config.rank_pattern = json["rank_pattern"].get<std::map<std::string, std::int64_t>>();
  }
  if (json.contains("alpha_pattern") && !json["alpha_pattern"].is_null()) {
    config.alpha_pattern = json["alpha_pattern"].get<std::map<std::string, double>>();
  }
  const auto text = [&](const char* key) {
    return json.contains(key) && json[key].is_string() ? json[key].get<std::string>() : "";
  };
  config.task_type = text("task_type");
  config.base_model_name_or_path = text("base_model_name_or_path");
  return config;
}

LoraConfig read_config(const std::string& path) {
  const std::string text = read_text_file(path);
  try {
    const Json json = Json::parse(text);
    refuse_variants(json, path);
    LoraConfig config = config_from(json);
    check_config(config);
    return config;
  } catch (const nlohmann::json::exception& error) {
    fail(Errc::kCorrupt, std::string("lora: adapter_config.json: ") + error.what(), {path, "", -1});
  }
}

torch::Tensor to_float(const TensorView& view) {
  torch::Tensor out = torch::empty(view.shape);
  widen_to_f32(view.dtype, view.bytes.data(), view.numel(), out.mutable_data_ptr<float>());
  return out;
}

/// Takes adapter tensors out of a file and remembers which were used.
class AdapterFile {
 public:
  explicit AdapterFile(const std::string& path) : file_(path) {}

  /// The tensor as float32, or undefined; a wrong shape throws (-1 = any size).
  torch::Tensor take(const std::string& name, const std::vector<std::int64_t>& shape) {
    const TensorView* view = file_.find(kPrefix + name);
    if (view == nullptr) return {};
    used_.insert(kPrefix + name);
    bool fits = view->shape.size() == shape.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i) {
      fits = shape[i] < 0 || view->shape[i] == shape[i];
    }
    if (!fits) {
      fail(Errc::kCorrupt,
           "lora: shape is " + shape_string(view->shape) + ", expected " + shape_string(shape) +
               " (-1 = any)",
           {file_.path(), kPrefix + name, -1});
    }
    return to_float(*view);
  }

  void refuse_unused() const {
    for (const auto& [name, view] : file_.tensors()) {
      if (!used_.contains(name)) {
        fail(Errc::kCorrupt, "lora: the model has no place for this tensor",
             {file_.path(), name, -1});
      }
    }
  }
  const std::string& path() const { return file_.path(); }

 private:
  SafetensorsFile file_;
  std::set<std::string> used_;
};

/// One adapter of a file; its magnitudes, where it is DoRA, are put on it.
Lora read_lora(AdapterFile& file, const std::string& name, const LinearImpl& layer,
               const LoraConfig& config) {
  const torch::Tensor a = file.take(name + ".lora_A.weight", {-1, layer.in_features});
  const torch::Tensor b = file.take(name + ".lora_B.weight", {layer.out_features, -1});
  if (!a.defined() || !b.defined() || a.size(0) != b.size(1) || a.size(0) < 1) {
    fail(Errc::kCorrupt, "lora: lora_A [r, in] and lora_B [out, r] are missing or differ in r",
         {file.path(), kPrefix + name, -1});
  }
  Lora lora(layer.in_features, layer.out_features, a.size(0), scaling_of(config, name, a.size(0)),
            config.lora_dropout, layer.device());
  const torch::NoGradGuard no_grad;
  lora->A.copy_(a);
  lora->B.copy_(b);
  if (!config.use_dora) return lora;
  const torch::Tensor m = file.take(name + ".lora_magnitude_vector", {layer.out_features});
  if (!m.defined()) {
    fail(Errc::kCorrupt, "lora: lora_magnitude_vector [out] is missing, which DoRA has",
         {file.path(), kPrefix + name, -1});
  }
  lora->set_magnitude(m);
  return lora;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

bool contains(const std::vector<std::string>& names, const std::string& name) {
  return std::ranges::find(names, name) != names.end();
}

void require_adapter(torch::nn::Module& model, const char* where, const std::string& name) {
  const std::vector<std::string> known = adapter_names(model);
  if (contains(known, name)) return;
  fail(Errc::kConfig, std::string(where) + ": adapter is '" + name + "', expected " +
                          (known.empty() ? "add_lora first" : "one of " + listed(known)));
}

void require_new(torch::nn::Module& model, const std::string& name) {
  if (!contains(adapter_names(model), name)) return;
  fail(Errc::kConfig, "lora: name of the adapter is '" + name +
                          "', which the model has already, expected another one (or "
                          "delete_adapter first)");
}

void set_trainable(const LoraImpl& adapter, bool trainable) {
  for (auto& p : adapter.parameters()) p.set_requires_grad(trainable);
}

void attach(const std::string& name, LinearImpl& layer, const LoraConfig& config,
            const std::string& adapter_name) {
  const std::int64_t r = from_pattern(config.rank_pattern, name, config.r);
  Lora lora(layer.in_features, layer.out_features, r, scaling_of(config, name, r),
            config.lora_dropout, layer.device());
  if (config.use_dora) lora->set_magnitude(layer.weight_norm(*lora));
  layer.set_lora(lora, adapter_name);
}

}  // namespace

std::int64_t add_lora(torch::nn::Module& model, const LoraConfig& config, const std::string& name) {
  check_config(config);
  require_new(model, name);
  const std::vector<std::string> active = active_adapters(model);
  std::int64_t count = 0;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    if (!is_target(layer_name, config)) continue;
    attach(layer_name, *layer, config, name);
    set_trainable(*layer->lora(name), active.empty());
    layer->set_active(active.empty() ? std::vector<std::string>{name} : active);
    ++count;
  }
  if (count == 0) {
    fail(Errc::kConfig, "lora: target_modules is [" + listed(config.target_modules) +
                            "], expected some of " + linear_kinds(model));
  }
  freeze_base(model);
  return count;
}

std::vector<torch::Tensor> lora_parameters(torch::nn::Module& model, const std::string& name) {
  std::vector<torch::Tensor> out;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    for (const auto& [adapter_name, adapter] : layer->loras()) {
      const bool wanted =
          name.empty() ? contains(layer->active(), adapter_name) : adapter_name == name;
      if (!wanted) continue;
      for (const auto& parameter : adapter->parameters()) out.push_back(parameter);
    }
  }
  return out;
}

std::vector<std::string> adapter_names(torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    for (const auto& [name, adapter] : layer->loras()) {
      if (!contains(names, name)) names.push_back(name);
    }
  }
  return names;
}

std::vector<std::string> active_adapters(torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    for (const std::string& name : layer->active()) {
      if (!contains(names, name)) names.push_back(name);
    }
  }
  return names;
}

void set_adapter(torch::nn::Module& model, const std::vector<std::string>& names,
                 bool inference_mode) {
  for (const std::string& name : names) require_adapter(model, "set_adapter", name);
  for (const auto& [layer_name, layer] : named_linears(model)) {
    layer->set_active(names);
    for (const auto& [name, adapter] : layer->loras()) {
      set_trainable(*adapter, !inference_mode && contains(names, name));
    }
  }
}

void delete_adapter(torch::nn::Module& model, const std::string& name) {
  require_adapter(model, "delete_adapter", name);
  for (const auto& [layer_name, layer] : named_linears(model)) {
    if (layer->merge_state && contains(layer->merge_state->names, name)) {
      fail(Errc::kConfig, "delete_adapter: adapter '" + name + "' is merged into layer '" +
                              layer_name + "', expected unmerge_adapter first");
    }
  }
  for (const auto& [layer_name, layer] : named_linears(model)) layer->remove_lora(name);
}

void save_lora_adapter(torch::nn::Module& model, const LoraConfig& config,
                       const std::string& folder, const std::string& name) {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> held;
  std::vector<std::pair<std::string, TensorView>> tensors;
  const auto add = [&](const std::string& key, const torch::Tensor& t) {
    held.push_back(t.detach().to(torch::kFloat).cpu().contiguous());
    tensors.emplace_back(kPrefix + key, tensor_view(held.back()));
  };
  LoraConfig written = config;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    const auto adapter = layer->lora(name);
    if (!adapter) continue;
    add(layer_name + ".lora_A.weight", adapter->A);
    add(layer_name + ".lora_B.weight", adapter->B);
    if (adapter->is_dora()) add(layer_name + ".lora_magnitude_vector", adapter->magnitude);
    written.use_dora = adapter->is_dora();  // what is in the file, whatever the config says
  }
  if (tensors.empty()) require_adapter(model, "save_lora_adapter", name);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail(Errc::kIo, "lora: cannot make the folder: " + error.message(), {folder, "", -1});
  const std::filesystem::path base(folder);
  write_safetensors((base / "adapter_model.safetensors").string(), tensors, {{"format", "pt"}});
  const std::string text = to_json(written).dump(2);
  write_file_atomic((base / "adapter_config.json").string(),
                    {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

LoraConfig load_lora_adapter(torch::nn::Module& model, const std::string& folder, bool trainable,
                             const std::string& name) {
  const std::filesystem::path base(folder);
  const LoraConfig config = read_config((base / "adapter_config.json").string());
  AdapterFile file((base / "adapter_model.safetensors").string());
  std::vector<std::pair<std::shared_ptr<LinearImpl>, Lora>> adapters;
  std::vector<std::pair<std::shared_ptr<LinearImpl>, torch::Tensor>> replaced;
  for (const auto& [layer_name, layer] : named_linears(model)) {
    if (is_target(layer_name, config))
      adapters.emplace_back(layer, read_lora(file, layer_name, *layer, config));
    const auto whole = file.take(layer_name + ".weight", {layer->out_features, layer->in_features});
    if (whole.defined()) replaced.emplace_back(layer, whole);
  }
  file.refuse_unused();
  // Everything fits: only now does the model change.
  std::vector<std::string> active = active_adapters(model);
  if (active.empty()) active = {name};
  for (const auto& [layer, weight] : replaced) layer->set_dense(weight, layer->current_bias());
  for (const auto& [layer, lora] : adapters) {
    set_trainable(*lora, trainable);
    layer->set_lora(lora, name);
  }
  for (const auto& [layer_name, layer] : named_linears(model)) layer->set_active(active);
  return config;
}

}  // namespace quantal

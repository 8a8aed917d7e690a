#include "quantal/torch/merge.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "quantal/torch/embedding.h"
#include "quantal/torch/lora.h"
#include "torch/merge_state.h"
#include "torch/stable_executor.h"

namespace quantal {
namespace {

using Names = std::vector<std::string>;

bool contains(const Names& names, const std::string& name) {
  return std::ranges::find(names, name) != names.end();
}

/// The adapters that a call means; checks the names that were given.
Names wanted(torch::nn::Module& model, const char* where, const Names& names) {
  const Names known = adapter_names(model);
  for (const std::string& name : names) {
    if (contains(known, name)) continue;
    std::string listed;
    for (const std::string& k : known) listed += (listed.empty() ? "" : ", ") + k;
    fail(Errc::kConfig, std::string(where) + ": adapter is '" + name + "', expected one of " +
                            (listed.empty() ? "those of add_lora" : listed));
  }
  return names.empty() ? active_adapters(model) : names;
}

/// Those of `names` that the layer has.
Names of_layer(const LinearImpl& layer, const Names& names) {
  Names out;
  for (const std::string& name : names) {
    if (layer.lora(name)) out.push_back(name);
  }
  return out;
}

/// The matrix that forward() multiplies with when these adapters are active. `weight` holds the
/// layer's values in float32 and may be written to. Norms are those of forward(), of the layer's
/// own weight and one adapter; PEFT's merge takes the norm of all that was added before.
torch::Tensor with_adapters(torch::Tensor weight, const LinearImpl& layer, const Names& names) {
  for (const std::string& name : names) {
    const auto adapter = layer.lora(name);
    weight = weight.add_(adapter->delta());
    if (!adapter->is_dora()) continue;
    weight = weight.mul_((adapter->magnitude / layer.weight_norm(*adapter)).unsqueeze(1));
  }
  return weight;
}

void require_finite(const torch::Tensor& weight, const std::string& layer) {
  if (torch::isfinite(weight).all().item<bool>()) return;
  fail(Errc::kUnsupported, "merge_adapter: the merged weight of layer '" + layer +
                               "' has infinite or undefined values, expected finite ones");
}

std::vector<torch::Tensor> state_copies(const QuantizedLayerImpl& layer) {
  std::vector<torch::Tensor> out;
  for (const auto& t : layer.parameters()) out.push_back(t.detach().clone());
  for (const auto& t : layer.buffers()) out.push_back(t.detach().clone());
  return out;
}

/// One layer on its way into and out of a merge.
class Merge {
 public:
  explicit Merge(LinearImpl& layer) : layer_(layer) {}

  MergeState remember() const {
    MergeState state;
    if (layer_.packed) {  // detached: the layer's own tensors get other data
      state.packed = layer_.packed->packed();
      for (auto* t : {&state.packed.codes, &state.packed.stats, &state.packed.shared}) {
        *t = t->detach();
      }
    } else if (layer_.custom) {
      state.custom = state_copies(*layer_.custom);
    } else {
      state.dense = layer_.weight.detach();
    }
    return state;
  }

  void put_back(const MergeState& state) {
    if (state.packed.defined()) {
      layer_.packed->set_packed(state.packed);
    } else if (layer_.custom) {
      std::size_t i = 0;
      for (auto& t : layer_.custom->parameters()) t.copy_(state.custom.at(i++));
      for (auto& t : layer_.custom->buffers()) t.copy_(state.custom.at(i++));
    } else {
      layer_.weight.set_data(state.dense);
    }
  }

  /// The values of the weight, which the caller may write to.
  torch::Tensor values() const {
    torch::Tensor w = layer_.dense_weight();
    return layer_.is_quantized() || !w.is_alias_of(layer_.weight) ? w : w.clone();
  }

  /// Puts `target` in; a change of nothing keeps the bytes.
  void take(const torch::Tensor& target, MergeState& state) {
    if (!layer_.is_quantized()) {
      layer_.weight.set_data(target.to(layer_.weight.scalar_type()));
      return;
    }
    const torch::Tensor before = layer_.dense_weight();
    if (!torch::equal(target, before)) layer_.quantized()->quantize_weights(target);
    if (layer_.packed) {
      state.survival =
          measure_survival(state.packed.cpu().view(), layer_.packed->packed().cpu().view(),
                           target.cpu().contiguous().const_data_ptr<float>(), stable_executor());
    } else {
      state.survival = survival_of(before, target);
    }
  }

 private:
  /// measure_survival for a form without codes.
  Survival survival_of(const torch::Tensor& before, const torch::Tensor& target) const {
    const auto d = (target - before).cpu().to(torch::kDouble);
    const auto e = (layer_.dense_weight() - before).cpu().to(torch::kDouble);
    const double dd = d.square().sum().item<double>(), ee = e.square().sum().item<double>();
    Survival out;
    out.delta_norm = std::sqrt(dd);
    if (dd > 0) {
      out.surviving = (d * e).sum().item<double>() / dd;
      out.noise = (e - out.surviving * d).norm().item<double>() / out.delta_norm;
    } else if (ee > 0) {
      out.noise = std::numeric_limits<double>::infinity();
    }
    return out;
  }

  LinearImpl& layer_;
};

/// Merges `names` beside what is merged already; the layer is as it was if anything fails.
void merge_layer(LinearImpl& layer, const std::string& name, const Names& names, bool safe) {
  const bool merged = layer.merge_state && !layer.merge_state->names.empty();
  Names all = merged ? layer.merge_state->names : Names{};
  const std::size_t had = all.size();
  for (const std::string& n : of_layer(layer, names)) {
    if (!contains(all, n)) all.push_back(n);
  }
  if (all.size() == had) return;
  Merge merge(layer);
  const MergeState current = merge.remember();
  auto state = std::make_shared<MergeState>(merged ? *layer.merge_state : current);
  try {
    if (merged) merge.put_back(*state);
    const torch::Tensor target = with_adapters(merge.values(), layer, all);
    if (safe) require_finite(target, name);
    merge.take(target, *state);
  } catch (...) {
    merge.put_back(current);
    throw;
  }
  state->names = all;
  layer.merge_state = std::move(state);
}

void unmerge_layer(LinearImpl& layer) {
  if (!layer.merge_state || layer.merge_state->names.empty()) return;
  Merge(layer).put_back(*layer.merge_state);
  layer.merge_state.reset();
}

/// Removes the adapters and what would undo a merge; the report stays.
void finish_layer(LinearImpl& layer) {
  layer.remove_lora();
  if (!layer.merge_state) return;
  auto kept = std::make_shared<MergeState>();
  kept->survival = layer.merge_state->survival;
  layer.merge_state = std::move(kept);
}

torch::ScalarType value_type(const QuantizedLinearImpl& layer) {
  return to_torch(layer.spec().value_dtype);
}

torch::ScalarType dense_type(const LinearImpl& layer) {
  if (layer.packed) return value_type(*layer.packed);
  return layer.custom ? layer.custom->dequantize_weights().scalar_type()
                      : layer.weight.scalar_type();
}

}  // namespace

void merge_adapter(torch::nn::Module& model, const Names& names, bool safe_merge) {
  const torch::NoGradGuard no_grad;
  const Names chosen = wanted(model, "merge_adapter", names);
  for (const auto& [name, layer] : named_linears(model)) {
    merge_layer(*layer, name, chosen, safe_merge);
  }
}

void unmerge_adapter(torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  for (const auto& [name, layer] : named_linears(model)) unmerge_layer(*layer);
}

MergeReport merge_report(torch::nn::Module& model) {
  MergeReport report;
  for (const auto& [name, layer] : named_linears(model)) {
    if (!layer->merge_state || !layer->merge_state->survival) continue;
    const Survival& s = *layer->merge_state->survival;
    const std::int64_t codes = layer->packed ? layer->in_features * layer->out_features : 0;
    report.layers.push_back({name, codes, s.codes_changed, s.delta_norm, s.surviving, s.noise});
  }
  return report;
}

void merge_and_unload(torch::nn::Module& model, const Names& names, bool safe_merge) {
  const torch::NoGradGuard no_grad;
  const Names chosen = wanted(model, "merge_and_unload", names);
  for (const auto& [name, layer] : named_linears(model)) {
    merge_layer(*layer, name, chosen, safe_merge);
    finish_layer(*layer);
  }
}

void unload(torch::nn::Module& model) {
  unmerge_adapter(model);
  for (const auto& [name, layer] : named_linears(model)) layer->remove_lora();
}

void dequantize_model(torch::nn::Module& model, std::optional<torch::ScalarType> dtype) {
  const torch::NoGradGuard no_grad;
  for (const auto& [name, layer] : named_linears(model)) {
    if (!layer->is_quantized()) continue;
    const auto values =
        layer->packed ? dequantize(layer->packed->packed(), dtype.value_or(dense_type(*layer)))
                      : layer->custom->dequantize_weights();
    layer->set_dense(dtype ? values.to(*dtype) : values, layer->current_bias());
  }
  for (const auto& [name, table] : named_embeddings(model)) {
    if (!table->is_quantized()) continue;
    table->set_dense(
        dequantize(table->packed->packed(), dtype.value_or(value_type(*table->packed))));
  }
}

void merge_to_full_precision(torch::nn::Module& model, const Names& names,
                             std::optional<torch::ScalarType> dtype, bool safe_merge) {
  const torch::NoGradGuard no_grad;
  const Names chosen = wanted(model, "merge_to_full_precision", names);
  unmerge_adapter(model);
  for (const auto& [name, layer] : named_linears(model)) {
    const Names own = of_layer(*layer, chosen);
    if (!own.empty()) {
      const torch::ScalarType type = dtype.value_or(dense_type(*layer));
      const torch::Tensor target = with_adapters(Merge(*layer).values(), *layer, own);
      if (safe_merge) require_finite(target, name);
      layer->set_dense(target.to(type), layer->current_bias());
    }
    finish_layer(*layer);
  }
  dequantize_model(model, dtype);
}

}  // namespace quantal

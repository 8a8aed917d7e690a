// Configs that are weighed against each other, and weight bytes beside the rule of thumb.
#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <random>

#include "checkpoint/plan_parts.h"
#include "policy/methods.h"

namespace quantal::checkpoint {
namespace {

using M = QuantizationMethod;
using Kind = OutlineTensor::Kind;

// ------------------------------------------------------------------ error of a form

constexpr std::int64_t kProbeRows = 64, kProbeCols = 1024;

/// Normally distributed weights, the same on every machine up to the last bits of log and cos.
const std::vector<float>& probe_weights() {
  static const std::vector<float> kWeights = [] {
    constexpr double kScale = 1.0 / 4294967296.0;
    std::mt19937 random(1);
    std::vector<float> out(static_cast<std::size_t>(kProbeRows * kProbeCols));
    for (float& value : out) {
      const double u = (static_cast<double>(random()) + 0.5) * kScale;
      const double v = static_cast<double>(random()) * kScale;
      value = static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v));
    }
    return out;
  }();
  return kWeights;
}

/// ||W - deq(W)|| / ||W|| of normally distributed weights; 0 where nothing is quantized.
double probe_error(const QuantizationConfig& resolved) {
  if (resolved.method == M::NONE) return 0;
  const std::vector<float>& weights = probe_weights();
  const auto choice = LayerRules(resolved).choose("probe", kProbeRows, kProbeCols);
  if (!choice.quantize) return 1;
  QuantizeOptions options = choice.options;
  options.value_dtype = DType::kF32;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(weights.data());
  const PackedMatrix packed =
      quantize(TensorView{DType::kF32, {kProbeRows, kProbeCols}, {bytes, weights.size() * 4}},
               options, serial_executor());
  std::vector<float> decoded(weights.size());
  dequantize(packed.view(), {0, kProbeRows, 0, kProbeCols}, DType::kF32, decoded.data(), kProbeCols,
             serial_executor());
  double error = 0, total = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double difference = static_cast<double>(weights[i]) - static_cast<double>(decoded[i]);
    error += difference * difference;
    total += static_cast<double>(weights[i]) * static_cast<double>(weights[i]);
  }
  return std::sqrt(error / total);
}

// ------------------------------------------------------------------ candidates

QuantizationConfig config_of(M method, int bits) {
  QuantizationConfig config;
  config.method = method;
  if (method == M::NONE) return config;
  config.bits = bits;
  config.bits_set = true;
  return config;
}

/// Methods of the backend in every width; no documented row names these widths of HQQ otherwise.
std::vector<QuantizationConfig> candidate_configs(const PlanOptions& options) {
  std::vector<QuantizationConfig> out = {config_of(M::NONE, 4)};
  const bool extended = options.support == Support::kExtended;
  for (const MethodInfo& method : methods()) {
    if (method.method == M::NONE || !method_built(method.method)) continue;
    if (!extended && !documented_support(options.backend, method.method)) continue;
    for (const int bits : policy::built_bits(method.method)) {
      if (bits < 2 || method_bits(method.method).value_or(bits) != bits) continue;
      out.push_back(config_of(method.method, bits));
    }
  }
  return out;
}

PlanCandidate weigh(const ModelOutline& model, const PlanOptions& options,
                    const QuantizationConfig& config) {
  const Plan plan = plan_config(model, options, config, nullptr);
  PlanCandidate candidate;
  candidate.config = config;
  candidate.label = plan.label();
  candidate.relative_error = probe_error(plan.decision.config);
  candidate.resident_bytes = plan.rank_bytes;
  candidate.peak_bytes = plan.peak().total();
  candidate.fits = plan.fits;
  return candidate;
}

// ------------------------------------------------------------------ rule of thumb

/// The same model in 16 bits, before anything was quantized.
ModelOutline in_sixteen_bits(const ModelOutline& model) {
  ModelOutline out = model;
  out.notes.clear();
  for (OutlineTensor& tensor : out.tensors) {
    if (tensor.kind == Kind::kPacked) {
      tensor.kind = is_lookup(tensor) ? Kind::kDense : Kind::kLinear;
      tensor.name += ".weight";
      tensor.spec.reset();
    }
    if (tensor.kind != Kind::kBuffer &&
        (is_weight_dtype(tensor.dtype) || tensor.dtype == DType::kF64)) {
      tensor.dtype = DType::kF16;
    }
    tensor.stored_bytes = -1;
  }
  std::erase_if(out.tensors, [](const OutlineTensor& t) { return t.trainable; });
  return out;
}

struct Rule {
  const char* width;
  M method;
  double bytes_per_parameter;
};
constexpr std::array<Rule, 4> kRules = {{{"fp16", M::NONE, 2},
                                         {"int8", M::BNB_INT8, 1},
                                         {"int4", M::BNB_NF4, 0.5},
                                         {"int2", M::QUANTO_INT2, 0.25}}};

}  // namespace

Plan recommend_plan(const ModelOutline& model, const PlanOptions& options) {
  std::vector<PlanCandidate> candidates;
  for (const QuantizationConfig& config : candidate_configs(options)) {
    candidates.push_back(weigh(model, options, config));
  }
  std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
    return a.relative_error < b.relative_error;
  });
  auto chosen = std::find_if(candidates.begin(), candidates.end(),
                             [](const PlanCandidate& c) { return c.fits; });
  if (chosen == candidates.end()) {
    chosen =
        std::min_element(candidates.begin(), candidates.end(),
                         [](const auto& a, const auto& b) { return a.peak_bytes < b.peak_bytes; });
  }
  FileBytes files;
  Plan plan = plan_config(model, options, chosen->config, &files);
  plan.recommended = options.memory_bytes != 0;
  plan.candidates = std::move(candidates);
  return plan;
}

void add_rules(const ModelOutline& model, Plan& plan) {
  const ModelOutline dense = in_sixteen_bits(model);
  PlanOptions options;
  options.backend = plan.options.backend;
  options.support = Support::kExtended;
  constexpr double kBillion = 1e9;
  const double billions = static_cast<double>(plan.parameters) / kBillion;
  for (const Rule& rule : kRules) {
    const Plan one = plan_config(
        dense, options, config_of(rule.method, method_bits(rule.method).value_or(4)), nullptr);
    PlanRule row;
    row.width = rule.width;
    row.method = rule.method == M::NONE ? "dense" : one.label();
    row.bytes_per_parameter = rule.bytes_per_parameter;
    row.exact_bytes = one.resident_bytes;
    for (const PlanLayer& layer : one.layers) {
      if (layer.quantized) row.quantized_parameters += layer.parameters;
      if (layer.quantized) row.quantized_bytes += layer.bytes;
    }
    row.rule_gigabytes =
        rule.bytes_per_parameter * (billions >= 1 ? std::round(billions) : billions);
    plan.rules.push_back(std::move(row));
  }
}

}  // namespace quantal::checkpoint

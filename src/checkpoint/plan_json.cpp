// A plan for programs.
#include "checkpoint/json.h"
#include "checkpoint/plan_parts.h"

namespace quantal {
namespace {

using checkpoint::Json;

Json layer_json(const PlanLayer& row) {
  return {{"name", row.name},
          {"method", row.method},
          {"reason", row.reason},
          {"unit", row.unit},
          {"shape", row.shape},
          {"quantized", row.quantized},
          {"parameters", row.parameters},
          {"stored_bytes", row.stored_bytes},
          {"codes_bytes", row.codes},
          {"stats_bytes", row.stats},
          {"shared_bytes", row.shared},
          {"bytes", row.bytes},
          {"rank_bytes", row.rank_bytes},
          {"file_bytes", row.file_bytes},
          {"adapter_parameters", row.adapter_parameters},
          {"adapter_rank_parameters", row.adapter_rank_parameters}};
}

Json phase_json(const PlanPhase& phase) {
  Json parts = Json::object();
  for (std::size_t i = 0; i < kNumPlanParts; ++i) {
    parts[std::string(plan_part_name(static_cast<PlanPart>(i)))] = phase.bytes[i];
  }
  return {{"name", phase.name},
          {"total", phase.total()},
          {"host_bytes", phase.host_bytes},
          {"parts", parts}};
}

Json rule_json(const PlanRule& rule) {
  return {{"width", rule.width},
          {"method", rule.method},
          {"bytes_per_parameter", rule.bytes_per_parameter},
          {"rule_gigabytes", rule.rule_gigabytes},
          {"exact_bytes", rule.exact_bytes},
          {"quantized_parameters", rule.quantized_parameters},
          {"quantized_bytes", rule.quantized_bytes}};
}

Json config_json(const QuantizationConfig& config) {
  return checkpoint::parse_json_object(config_to_json(config), "config");
}

Json candidate_json(const PlanCandidate& candidate) {
  return {{"label", candidate.label},
          {"config", config_json(candidate.config)},
          {"relative_error", candidate.relative_error},
          {"resident_bytes", candidate.resident_bytes},
          {"peak_bytes", candidate.peak_bytes},
          {"fits", candidate.fits}};
}

Json substitution_json(const Substitution& s) {
  return {{"what", s.what}, {"asked", s.asked}, {"used", s.used}, {"reason", s.reason}};
}

Json sizes_json(const PlanSizes& s) {
  return {{"hidden", s.hidden},
          {"vocabulary", s.vocabulary},
          {"blocks", s.blocks},
          {"heads", s.heads},
          {"query", s.query},
          {"key_value", s.key_value},
          {"widest", s.widest},
          {"activation_dtype", dtype_torch_name(s.activation_dtype)},
          {"compute_dtype", dtype_torch_name(s.compute_dtype)}};
}

Json options_json(const PlanOptions& o) {
  const bool adamw = o.optimizer == PlanOptimizer::kAdamW;
  Json out = {{"backend", backend_name(o.backend)},
              {"memory_bytes", o.memory_bytes},
              {"world_size", o.world_size},
              {"mode", plan_mode_name(o.mode)},
              {"batch_size", o.batch_size},
              {"sequence_length", o.sequence_length},
              {"attention", o.attention == PlanAttention::kSdpa ? "sdpa" : "eager"}};
  if (o.mode != PlanMode::kQlora) return out;
  out.update({{"lora_rank", o.lora_rank},
              {"lora_targets", o.lora_targets},
              {"lora_dropout", o.lora_dropout},
              {"lora_dtype", dtype_torch_name(o.lora_dtype)},
              {"optimizer", adamw ? "adamw" : "sgd"},
              {"gradient_checkpointing", o.gradient_checkpointing},
              {"loss_chunk", o.loss_chunk},
              {"norms_in_float32", o.float32_norms},
              {"cpu_offload", o.cpu_offload}});
  return out;
}

template <class Values, class Function>
Json list_json(const Values& values, const Function& one) {
  Json out = Json::array();
  for (const auto& value : values) out.push_back(one(value));
  return out;
}

}  // namespace

std::string Plan::to_json() const {
  Json out = {{"source", source},
              {"label", label()},
              {"config", config_json(decision.config)},
              {"adapter", decision.adapter},
              {"recommended", recommended},
              {"fits", fits},
              {"verdict", checkpoint::verdict(*this)},
              {"usable_bytes", usable_bytes},
              {"peak_bytes", peak().total()},
              {"peak_phase", peak().name},
              {"largest_batch", largest_batch},
              {"parameters", parameters},
              {"adapter_parameters", adapter_parameters},
              {"stored_bytes", stored_bytes},
              {"resident_bytes", resident_bytes},
              {"rank_bytes", rank_bytes},
              {"file_bytes", file_bytes}};
  out["options"] = options_json(options);
  out["sizes"] = sizes_json(sizes);
  out["phases"] = list_json(phases, phase_json);
  out["rules"] = list_json(rules, rule_json);
  out["candidates"] = list_json(candidates, candidate_json);
  out["substitutions"] = list_json(decision.substitutions, substitution_json);
  out["unmatched_patterns"] = unmatched_patterns;
  out["notes"] = notes;
  out["layers"] = list_json(layers, layer_json);
  return checkpoint::dump_json(out);
}

}  // namespace quantal

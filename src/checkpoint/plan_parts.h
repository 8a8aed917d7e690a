// The steps of a plan.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/plan.h"

namespace quantal::checkpoint {

// ------------------------------------------------------------------ names

/// Last component of a dotted name.
std::string_view last_part(std::string_view name);
/// "a.b" of "a.b.weight"; the name itself where it has no such end.
std::string module_name(const OutlineTensor& tensor);
/// The name up to its first number, "model.layers.3": what FSDP gathers at a time. Empty if there
/// is none.
std::string unit_of(const std::string& name);
/// True for layers that look rows up.
bool is_lookup(const OutlineTensor& tensor);
/// True for a layer that multiplies activations, quantized or not.
bool multiplies(const OutlineTensor& tensor);

// ------------------------------------------------------------------ sizes

std::int64_t bytes_of(const OutlineTensor& tensor);  ///< as stored
std::int64_t numel_of(const OutlineTensor& tensor);
inline std::int64_t size_of(DType dtype) { return static_cast<std::int64_t>(dtype_size(dtype)); }
/// Bytes of [rows, ...] of which a rank holds ceil(rows / ranks) rows.
std::int64_t share_of(std::int64_t rows, std::int64_t row_bytes, std::int64_t ranks);

/// Bytes that the tensors of a layer take in the default layout of its dialect, without writing
/// one: small matrices of the same form are exported and the larger one follows from them. Caches.
class FileBytes {
 public:
  std::int64_t of(const PackedSpec& spec);

 private:
  std::map<std::array<std::int64_t, kSpecInts>, std::int64_t> known_;
};

// ------------------------------------------------------------------ steps

/// Throws Error{kConfig} for options that mean nothing.
void check_plan_options(const PlanOptions& options);
/// Sizes behind the bounds; assumptions go to `notes`.
PlanSizes sizes_of(const ModelOutline& model, const PlanOptions& options, DType compute_dtype,
                   std::vector<std::string>& notes);

/// Rows of the plan under the resolved config of plan.decision, and the totals. `files` may be
/// null: file_bytes stay 0.
void add_layers(const ModelOutline& model, Plan& plan, FileBytes* files);
/// Phases from the rows. Needs plan.sizes and plan.layers.
void add_phases(const ModelOutline& model, Plan& plan);
/// The batch that just fits, where memory is known.
void add_largest_batch(const ModelOutline& model, Plan& plan);
/// Weight bytes beside the rule of thumb.
void add_rules(const ModelOutline& model, Plan& plan);

/// Largest memory that activations take; per step of one rank.
struct ActivationBytes {
  std::int64_t forward = 0, backward = 0;                ///< kActivations at the peak of the phase
  std::int64_t forward_logits = 0, backward_logits = 0;  ///< kLogits at the same moment
  std::int64_t cache = 0;                                ///< inference
};
ActivationBytes activation_bytes(const ModelOutline& model, const Plan& plan);

/// A plan for one config: decision, sizes, rows, phases, judgement.
Plan plan_config(const ModelOutline& model, const PlanOptions& options,
                 const std::optional<QuantizationConfig>& config, FileBytes* files);
/// The best config that fits, or the smallest if none does.
Plan recommend_plan(const ModelOutline& model, const PlanOptions& options);

// ------------------------------------------------------------------ text

/// "1.82 GB", decimal units.
std::string gigabytes(std::int64_t bytes);
/// "6.74 B", "134.5 M".
std::string count_text(std::int64_t count);
/// "fits: ..." or by how much not.
std::string verdict(const Plan& plan);

}  // namespace quantal::checkpoint

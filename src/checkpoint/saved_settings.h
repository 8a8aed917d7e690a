// Where a file and a config differ.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "quantal/policy.h"

namespace quantal::checkpoint {

/// A linear layer as a file has it.
struct SavedLayer {
  std::string name;
  std::int64_t rows = 0, cols = 0;
  std::optional<PackedSpec> form;  ///< nullopt: dense
};

/// LoadReport::settings of a (resolved) config.
std::vector<Substitution> saved_settings(const QuantizationConfig& config,
                                         const std::vector<SavedLayer>& layers);

}  // namespace quantal::checkpoint

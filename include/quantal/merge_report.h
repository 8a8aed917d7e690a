// quantal merge report: what merging adapters into quantized layers changed. Part of the room
// policy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quantal {

/// One quantized layer into which adapters were merged. D is the change that they asked for, E the
/// one that quantizing the sum made, both as matrices of exact values.
struct LayerMerge {
  std::string name;                ///< of the layer
  std::int64_t codes = 0;          ///< codes of the layer; 0 for a form of one's own
  std::int64_t codes_changed = 0;  ///< those that are other ones now
  double delta_norm = 0;           ///< `||D||` (Frobenius)
  double surviving = 1;            ///< `<E, D> / <D, D>`: 1 all of it, 0 lost to rounding
  double noise = 0;                ///< `||E - surviving D|| / ||D||`: what rounding added
};

/// What merging into quantized layers changed.
struct MergeReport {
  std::vector<LayerMerge> layers;  ///< in registration order

  std::int64_t codes() const;          ///< of all layers
  std::int64_t codes_changed() const;  ///< of all layers
  double surviving() const;            ///< mean, layers weighted by `||D||^2`; 1 without any
  double noise() const;                ///< root of the mean square, weighted likewise
  /// A table for a terminal, the layers that kept least first.
  std::string to_text() const;
  /// Object {codes, codes_changed, surviving, noise, layers: [members of LayerMerge]}.
  std::string to_json() const;
};

}  // namespace quantal
